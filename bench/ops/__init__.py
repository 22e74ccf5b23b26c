"""Every op and composite beside its peers and the device's limits."""
