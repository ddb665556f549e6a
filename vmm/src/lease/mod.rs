//! The lease of a guest on this host (DESIGN §5, *Self-fence*): when its deadline passes, the guest stops
//! by itself, its I/O is taken back from the kernel, its shared disks are closed. [`quiesce`] is the part that disks implement.

pub mod quiesce;
