//! The qcow2 format: bytes to typed values and back, without I/O.
