//! Running out of GPU memory as a value, not as a crash.
//!
//! libtorch throws, tch's plain methods turn that into a panic, and its `f_` twins into an error.
//! A caller that can do the same work in smaller pieces needs neither: it uses [`unless_exhausted`].

use std::any::Any;
use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

use anyhow::Result;

/// Messages of libtorch, CUDA, cuBLAS and cuDNN when memory runs out.
const SIGNS: [&str; 5] = [
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "can't allocate memory",
    // Our own words, where work in pieces could not be made smaller.
    "memory ran out",
];

thread_local! {
    /// Is this thread inside [`unless_exhausted`]?
    static EXPECTED: Cell<bool> = const { Cell::new(false) };
}

/// Run `work`; `None` if memory ran out, on a GPU or on the host, and libtorch's unused GPU memory is
/// then back with the driver. Tensors that `work` held are dropped by then.
///
/// `work` must leave nothing half done, or do it over when it is called again.
///
/// # Errors
/// Those of `work` that are not about memory.
///
/// # Panics
/// Those of `work` that are not about memory.
pub fn unless_exhausted<T>(work: impl FnOnce() -> Result<T>) -> Result<Option<T>> {
    silence_expected_panics();
    let before = EXPECTED.replace(true);
    let outcome = panic::catch_unwind(AssertUnwindSafe(work));
    EXPECTED.set(before);
    match outcome {
        Ok(Ok(value)) => return Ok(Some(value)),
        Ok(Err(error)) if !is_sign(&format!("{error:#}")) => return Err(error),
        Err(payload) if !is_exhaustion(&*payload) => panic::resume_unwind(payload),
        // The error or the payload is dropped here, and with it what it may hold.
        Ok(Err(_)) | Err(_) => {}
    }
    if crate::cuda_count() > 0 {
        crate::empty_cache()?;
    }
    Ok(None)
}

/// The default hook would print what is not going to be an error.
fn silence_expected_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let hook = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !(EXPECTED.get() && is_exhaustion(info.payload())) {
                hook(info);
            }
        }));
    });
}

fn is_exhaustion(payload: &(dyn Any + Send)) -> bool {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied()).is_some_and(is_sign)
}

fn is_sign(text: &str) -> bool {
    SIGNS.iter().any(|sign| text.contains(sign))
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::bail;
    use tch::{Device, Kind, Tensor};

    #[test]
    fn panics_and_errors_about_memory_become_none() {
        let panic = || -> Result<()> {
            panic!(
                "called `Result::unwrap()` on an `Err` value: Torch(\"CUDA out of memory. Tried to allocate\")"
            )
        };
        assert!(unless_exhausted(panic).unwrap().is_none());
        let error = || -> Result<()> { bail!("libtorch: CUDA out of memory. Tried to allocate 2 GiB") };
        assert!(unless_exhausted(error).unwrap().is_none());
        assert_eq!(unless_exhausted(|| Ok(3)).unwrap(), Some(3));
        assert_eq!(
            unless_exhausted(|| -> Result<()> { bail!("bad file") }).unwrap_err().to_string(),
            "bad file"
        );
        let other =
            panic::catch_unwind(|| unless_exhausted(|| -> Result<()> { panic!("a bug, not memory") }));
        assert!(other.is_err(), "other panics go on");
        assert!(!EXPECTED.get());
    }

    /// libtorch's own words: 4 EiB are on no machine.
    #[test]
    fn a_tensor_too_large_for_the_machine_is_recognized() {
        let device = if crate::cuda_count() > 0 { Device::Cuda(0) } else { Device::Cpu };
        let held = Tensor::ones([4], (Kind::Float, device));
        let large = || Ok(Tensor::empty([1 << 50, 1 << 10], (Kind::Float, device)));
        assert!(unless_exhausted(large).unwrap().is_none());
        assert_eq!(held.sum(Kind::Float).double_value(&[]), 4.0, "and the device works on");
    }
}
