//! A guest that stands still, as bytes: saved to a file, or on its way to another host.
pub mod blob;
pub mod frame;
pub mod header;
pub mod memory;
pub mod payload;
pub mod processor;
pub mod stream;
pub mod vcpu;
pub mod vm;
