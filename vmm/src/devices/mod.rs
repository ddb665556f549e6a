//! The devices of a guest, a folder each.
