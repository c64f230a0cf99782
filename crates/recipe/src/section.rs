//! The sections of a recipe, one file each.

pub mod benchmark;
pub mod data;
pub mod eval;
pub mod export;
pub mod extract;
pub mod facts;
pub mod label;
pub mod launch;
pub mod loss;
pub mod mapper;
pub mod model;
pub mod prune;
pub mod steps;
pub mod train;
