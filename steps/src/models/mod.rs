//! `models:` of a pipeline: what an entry may say, and how its files are had.

pub mod weights;
