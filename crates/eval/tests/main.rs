//! The evaluation as a whole, on the small trained pair of the project.
//!
//! - `fixture`: shards, mapper and contexts of the nano pair
//! - `whole`: every method and both tasks; what must hold at full and at small budgets
//! - `answers`: what is written as an answer is what greedy decoding says
//! - `benchmarks`: tasks of standard benchmarks, conversations, more examples later
//! - `budgets`: where head budgets come from
//! - `continued`: an interrupted evaluation ends with the same numbers
//! - `refused`: shards that do not belong together
//! - `stored`: what an earlier version stored is read and added to
//! - `union`: other tasks, methods, ratios and limits add to what is there

#[path = "nano/answers.rs"]
mod answers;
#[path = "nano/benchmarks.rs"]
mod benchmarks;
#[path = "nano/budgets.rs"]
mod budgets;
#[path = "nano/continued.rs"]
mod continued;
#[path = "nano/fixture.rs"]
mod fixture;
#[path = "nano/refused.rs"]
mod refused;
#[path = "nano/stored.rs"]
mod stored;
#[path = "nano/union.rs"]
mod union;
#[path = "nano/whole.rs"]
mod whole;
