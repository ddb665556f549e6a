//! What the tools share: a client of hostd's API.
//!
//! Start reading at [`client::Client`].

pub mod client;
