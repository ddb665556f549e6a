//! The virtio transport.
