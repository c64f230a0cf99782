//! Stage folders from the outside: written, broken, continued, read.

mod common;
mod crash;
mod damage;
mod example_rows;
mod pieces;
mod round_trip;
