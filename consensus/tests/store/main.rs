//! The stores, told as stories: openraft's own suite, restarts, power cuts at every change, damage, snapshots.

mod check;
mod durability;
mod events;
mod flips;
mod log;
mod snapshots;
mod suite;
mod world;
