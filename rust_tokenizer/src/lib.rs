//! ECG-Byte: an ECG as a string of amplitude symbols a to z, and that string as byte-pair tokens.
//!
//! `quantize` makes the symbols, `automaton` the tokens, `train` learns the merges, `tokenizer` puts them together and
//! reads the JSON file. Python is known to `python` alone.

mod automaton;
#[cfg(feature = "python")]
mod python;
mod quantize;
mod tokenizer;
mod train;

use std::fmt;

pub use tokenizer::Tokenizer;
pub use train::{Options, train};

/// One record: `values` are its leads in millivolts, one after the other, each of `samples` values.
#[derive(Clone, Copy, Debug)]
pub struct Ecg<'a> {
    pub values: &'a [f32],
    pub samples: usize,
}

/// What is wrong with the input, in words.
#[derive(Clone, Debug, PartialEq)]
pub struct Error(String);

impl fmt::Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for Error {}
