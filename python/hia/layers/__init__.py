"""The adapter's layers: extractor and injection, their plan, their folded weights, their layout."""
