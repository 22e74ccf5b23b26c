"""The paper's Table 3 beside ours."""
