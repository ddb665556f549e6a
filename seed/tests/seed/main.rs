//! What a guest finds on the disk, told area by area.

mod bounds;
mod golden;
mod guests;
mod injection;
mod rules;
mod world;
