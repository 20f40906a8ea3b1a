//! The Python module `ecg_byte`: arrays in and out without a copy, the GIL released while Rust works.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::{Ecg, Error, Options, Tokenizer, train};

impl From<Error> for PyErr {
    fn from(error: Error) -> PyErr {
        PyValueError::new_err(error.to_string())
    }
}

/// An ECG argument, borrowed from NumPy.
struct Record<'py>(PyReadonlyArray2<'py, f32>);

impl<'py> Record<'py> {
    fn ecg(&self) -> PyResult<Ecg<'_>> {
        let values = self.0.as_slice().ok().filter(|_| self.0.is_c_contiguous()).ok_or_else(|| {
            PyValueError::new_err("The ECG is not C-contiguous and aligned in memory; pass ecg.copy().")
        })?;
        Ok(Ecg { values, samples: self.0.shape()[1] })
    }
}

impl<'py> FromPyObject<'_, 'py> for Record<'py> {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        Ok(Record(array(&object, "The ECG is", "a float32 array [leads, samples]")?))
    }
}

/// The array `object`, or a TypeError that says what it is instead.
fn array<'a, 'py, T: FromPyObject<'a, 'py>>(object: &'a Bound<'py, PyAny>, name: &str, expected: &str) -> PyResult<T> {
    object.extract().map_err(|_| {
        let array = || Ok::<_, PyErr>(format!("an array of {} {}", object.getattr("dtype")?, object.getattr("shape")?));
        let found = array().unwrap_or_else(|_| format!("of type {}", object.get_type()));
        PyTypeError::new_err(format!("{name} {found}; expected {expected}."))
    })
}

fn records<'py>(ecgs: &Bound<'py, PyAny>) -> PyResult<Vec<Record<'py>>> {
    ecgs.try_iter()?.map(|ecg| ecg?.extract()).collect()
}

/// Encodes ECGs as byte-pair tokens, and decodes them.
#[pyclass(name = "Tokenizer", module = "ecg_byte", frozen)]
struct PyTokenizer(Tokenizer);

#[pymethods]
impl PyTokenizer {
    #[new]
    #[pyo3(signature = (merges, millivolt_range=None, across_leads=true, sampling_rate=None))]
    fn new(
        merges: Vec<String>,
        millivolt_range: Option<(f64, f64)>,
        across_leads: bool,
        sampling_rate: Option<f64>,
    ) -> PyResult<Self> {
        Ok(PyTokenizer(Tokenizer::new(merges, millivolt_range, across_leads, sampling_rate)?))
    }

    /// Reads the content of an `ecg_byte.json`.
    #[staticmethod]
    fn from_json(text: &str) -> PyResult<Self> {
        Ok(PyTokenizer(Tokenizer::from_json(text)?))
    }

    #[getter]
    fn merges(&self) -> Vec<String> {
        self.0.merges().to_vec()
    }

    #[getter]
    fn millivolt_range(&self) -> Option<(f64, f64)> {
        self.0.millivolt_range()
    }

    #[getter]
    fn across_leads(&self) -> bool {
        self.0.across_leads()
    }

    #[getter]
    fn sampling_rate(&self) -> Option<f64> {
        self.0.sampling_rate()
    }

    /// The uint32 ids of a float32 ECG [leads, samples] in millivolts.
    fn encode<'py>(&self, py: Python<'py>, ecg: Record<'py>) -> PyResult<Bound<'py, PyArray1<u32>>> {
        let ecg = ecg.ecg()?;
        let ids = py.detach(|| self.0.encode(ecg))?;
        Ok(ids.into_pyarray(py))
    }

    /// `encode` of each ECG, on `num_threads` threads (None: one for each core).
    #[pyo3(signature = (ecgs, num_threads=None))]
    fn encode_batch<'py>(
        &self,
        py: Python<'py>,
        ecgs: &Bound<'py, PyAny>,
        num_threads: Option<usize>,
    ) -> PyResult<Vec<Bound<'py, PyArray1<u32>>>> {
        if num_threads == Some(0) {
            return Err(PyValueError::new_err("num_threads is 0; it must be at least 1, or None for all cores."));
        }
        let records = records(ecgs)?;
        let ecgs = records.iter().map(Record::ecg).collect::<PyResult<Vec<_>>>()?;
        let ids = py.detach(|| self.0.encode_batch(&ecgs, num_threads))?;
        Ok(ids.into_iter().map(|ids| ids.into_pyarray(py)).collect())
    }

    /// The symbols' amplitudes in millivolts, all leads in one row; a stands at `low`, z at `high`.
    fn decode<'py>(
        &self,
        py: Python<'py>,
        ids: &Bound<'py, PyAny>,
        low: f32,
        high: f32,
    ) -> PyResult<Bound<'py, PyArray1<f32>>> {
        let ids: PyReadonlyArray1<u32> = array(ids, "The ids are", "a uint32 array [tokens]")?;
        let ids = ids.as_slice()?;
        let values = py.detach(|| self.0.decode(ids, low, high))?;
        Ok(values.into_pyarray(py))
    }
}

/// Learns merges by byte-pair encoding.
#[pyfunction]
#[pyo3(name = "train", signature = (
    records, num_merges, millivolt_range=None, across_leads=true, min_frequency=2, progress=None
))]
fn py_train(
    py: Python<'_>,
    records: &Bound<'_, PyAny>,
    num_merges: usize,
    millivolt_range: Option<(f64, f64)>,
    across_leads: bool,
    min_frequency: u32,
    progress: Option<Py<PyAny>>,
) -> PyResult<Vec<String>> {
    const INTERVAL: Duration = Duration::from_millis(250);
    let records = self::records(records)?;
    let ecgs = records.iter().map(Record::ecg).collect::<PyResult<Vec<_>>>()?;
    let options = Options { num_merges, millivolt_range, across_leads, min_frequency };
    let mut outcome = Ok(());
    let merges = py.detach(|| {
        let mut due = Instant::now();
        train(&ecgs, options, |merges, count| {
            if Instant::now() < due {
                return ControlFlow::Continue(());
            }
            due = Instant::now() + INTERVAL;
            outcome = Python::attach(|py| {
                py.check_signals()?;
                progress.as_ref().map_or(Ok(()), |progress| progress.call1(py, (merges, count)).map(drop))
            });
            if outcome.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })
    })?;
    outcome.map(|()| merges)
}

#[pymodule]
#[pyo3(name = "ecg_byte")]
mod module {
    #[pymodule_export]
    use super::{PyTokenizer, py_train};
}
