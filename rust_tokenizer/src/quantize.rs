//! Amplitudes to symbols, in float32 and in the order of operations of the published tokenizer.

use multiversion::multiversion;

use crate::Error;

/// Symbols are numbered 0 to 25 here, and written a to z.
pub const NUM_SYMBOLS: usize = 26;

/// The amplitudes, in millivolts, of the lowest and the highest symbol.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    low: f32,
    width: f32,
}

impl Scale {
    /// The fixed range `range`, or else from the record's lowest to its highest value.
    pub fn of(values: &[f32], range: Option<(f32, f32)>) -> Result<Scale, Error> {
        if values.is_empty() {
            return Err(Error("The ECG is empty; expected at least one sample.".into()));
        }
        let (lowest, highest, finite) = extremes(values);
        if !finite {
            return Err(Error("The ECG holds NaN or infinite values; expected finite millivolts.".into()));
        }
        let ((low, high), margin) = match range {
            Some(range) => (range, 0.0),
            None => ((lowest, highest), 1e-6),
        };
        let width = (high - low) + margin;
        if width.is_infinite() {
            return Err(Error(format!(
                "The range from {low:e} to {high:e} mV overflows float32; expected millivolts."
            )));
        }
        Ok(Scale { low, width })
    }

    /// Writes the symbol of each value.
    pub fn quantize(self, values: &[f32], symbols: &mut [u8]) {
        quantize(values, self.low, self.width, symbols);
    }
}

/// Lowest and highest value, and whether all are finite.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2"))]
fn extremes(values: &[f32]) -> (f32, f32, bool) {
    const LANES: usize = 32;
    let mut low = [f32::INFINITY; LANES];
    let mut high = [f32::NEG_INFINITY; LANES];
    let mut magnitude = [0u32; LANES];
    let mut update = |lane: usize, value: f32| {
        low[lane] = if value < low[lane] { value } else { low[lane] };
        high[lane] = if value > high[lane] { value } else { high[lane] };
        // ordered as the numbers are, with infinity and NaN above all others
        magnitude[lane] = magnitude[lane].max(value.abs().to_bits());
    };
    let (blocks, rest) = values.as_chunks::<LANES>();
    for block in blocks {
        for (lane, &value) in block.iter().enumerate() {
            update(lane, value);
        }
    }
    for (lane, &value) in rest.iter().enumerate() {
        update(lane, value);
    }
    (
        low.into_iter().fold(f32::INFINITY, f32::min),
        high.into_iter().fold(f32::NEG_INFINITY, f32::max),
        magnitude.into_iter().all(|bits| bits < f32::INFINITY.to_bits()),
    )
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2"))]
fn quantize(values: &[f32], low: f32, width: f32, symbols: &mut [u8]) {
    // 2^23: a sum with it has the whole number in its lowest bits; a cast would not be vectorised
    const INTEGER: f32 = 8_388_608.0;
    for (symbol, &value) in symbols.iter_mut().zip(values) {
        let level = ((value - low) / width).clamp(0.0, 1.0);
        let floor = (level * NUM_SYMBOLS as f32).floor().min(NUM_SYMBOLS as f32 - 1.0);
        *symbol = (floor + INTEGER).to_bits() as u8;
    }
}
