//! `cargo bench`: the fastest of many runs, on simulated ECGs.

use std::hint::black_box;
use std::ops::ControlFlow;
use std::time::Instant;

use ecg_byte::{Ecg, Options, Tokenizer, train};

const LEADS: usize = 12;
const SAMPLES: usize = 2500;
const NUM_RECORDS: usize = 256;

/// Beats of a random rate over a wandering baseline with noise, at 250 Hz.
fn simulate(seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u32 << 24) as f32
    };
    let beat = 150.0 + 120.0 * random();
    let mut values = Vec::with_capacity(LEADS * SAMPLES);
    for _ in 0..LEADS {
        let (qrs, t, drift) = (2.0 * random() - 0.5, 0.4 * random(), 0.1 * random());
        values.extend((0..SAMPLES).map(|sample| {
            let phase = (sample as f32 % beat) / 250.0;
            let bump = |center: f32, width: f32| (-((phase - center) / width).powi(2)).exp();
            let baseline = drift * (sample as f32 / 400.0).sin() + 0.02 * (random() - 0.5);
            qrs * bump(0.2, 0.015) + t * bump(0.45, 0.06) + 0.1 * bump(0.08, 0.03) + baseline
        }));
    }
    values
}

/// Prints how long the fastest `run` over all records took.
fn report(name: &str, runs: usize, mut run: impl FnMut()) {
    let seconds = (0..runs).map(|_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    });
    let fastest = seconds.fold(f64::INFINITY, f64::min);
    println!("{name:<28}{:>10.2} us a record", 1e6 * fastest / NUM_RECORDS as f64);
}

fn main() {
    let records: Vec<Vec<f32>> = (0..NUM_RECORDS as u64).map(simulate).collect();
    let ecgs: Vec<Ecg> = records.iter().map(|values| Ecg { values, samples: SAMPLES }).collect();
    let options = Options { num_merges: 10_000, millivolt_range: None, across_leads: true, min_frequency: 2 };
    let learn = || train(&ecgs, options, |_, _| ControlFlow::Continue(())).unwrap();
    let tokenizer = Tokenizer::new(learn(), None, true, None).unwrap();
    let ids = tokenizer.encode_batch(&ecgs, None).unwrap();
    let num_tokens: usize = ids.iter().map(Vec::len).sum();
    println!("{} merges, {} tokens a record", tokenizer.merges().len(), num_tokens / NUM_RECORDS);

    report("train", 3, || drop(black_box(learn())));
    let encode = || ecgs.iter().for_each(|&ecg| drop(black_box(tokenizer.encode(ecg))));
    report("encode", 50, encode);
    for num_threads in [1, 2] {
        let encode_batch = || drop(black_box(tokenizer.encode_batch(&ecgs, Some(num_threads))));
        report(&format!("encode_batch, {num_threads} threads"), 50, encode_batch);
    }
    let decode = || ids.iter().for_each(|ids| drop(black_box(tokenizer.decode(ids, -1.0, 1.0))));
    report("decode", 50, decode);
    report("copy", 50, || records.iter().for_each(|values| drop(black_box(values.clone()))));
}
