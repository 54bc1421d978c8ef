"""Host: the process and the machine in which the library is a guest.

Others use `process` (what is put back after a call), `allocator` (glibc's memory) and `limits` (the
cores and the memory that a container or a job leaves). Knows nothing else of the project.
"""
