//! The PCI Express hierarchy of a guest.
