"""Time, memory, accuracy, the device's limits, and what a workload costs."""
