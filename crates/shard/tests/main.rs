//! Stage folders from the outside: written, broken, continued, read.

/// Rows that the other files write, and folders to write them to.
mod common;
/// A process that dies at any moment costs nothing but time.
mod crash;
/// Bytes, files and choices that changed behind the index's back.
mod damage;
/// The three stages as one: rows belong together or are refused.
mod example_rows;
/// What goes in comes out, in any order, and the same bytes each time.
mod round_trip;
/// How long writing takes.
mod speed;
