"""Imported by every Python that starts under the sanitizers: UBSan's reports go to files, as ASan's do by themselves.

Beside another sanitizer GCC's UBSan does not read ``log_path``, and pytest would swallow what it prints.
"""

import ctypes
import os

if "UBSAN_LIBRARY" in os.environ:
    ctypes.CDLL(os.environ["UBSAN_LIBRARY"]).__sanitizer_set_report_path(os.environ["UBSAN_REPORTS"].encode())
