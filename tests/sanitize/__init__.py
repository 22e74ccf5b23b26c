"""The native kernels under AddressSanitizer and UndefinedBehaviorSanitizer: ``make test-sanitize``."""
