//! Loaded kernels: found in memory, on disk, or compiled; and their launch on libtorch's current stream.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use anyhow::{Context, Result, anyhow};
use cudarc::driver::{result, sys};
use sha2::{Digest, Sha256};
use tch::{Device, Tensor};

use super::source::{Variant, compile, version};
use crate::Stream;

/// A kernel, ready to launch on one GPU.
#[derive(Clone, Copy)]
pub struct Kernel {
    function: sys::CUfunction,
    gpu: usize,
}

// SAFETY: a handle of the driver's, valid in every thread that has the GPU's primary context.
unsafe impl Send for Kernel {}

/// One argument of a kernel.
pub enum Arg<'a> {
    Tensor(&'a Tensor),
    /// A null pointer.
    Absent,
    Int(i32),
    Long(i64),
    Float(f32),
    /// Of a struct of ints, by value.
    Ints(&'a [i32]),
}

/// Blocks, threads per block and bytes of shared memory.
pub struct Launch {
    pub grid: [usize; 3],
    pub threads: usize,
    pub shared: usize,
}

type Key = (usize, Variant, &'static str, usize);

/// The kernel `name` of a compilation, allowed `shared` bytes of shared memory.
///
/// # Errors
/// NVRTC or the driver refuses.
pub fn kernel(device: Device, variant: Variant, name: &'static str, shared: usize) -> Result<Kernel> {
    static LOADED: OnceLock<Mutex<HashMap<Key, Kernel>>> = OnceLock::new();
    let Device::Cuda(gpu) = device else { return Err(anyhow!("kernels are for CUDA, not {device:?}")) };
    let _entered = Entered::new(gpu)?;
    let mut loaded = LOADED.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(kernel) = loaded.get(&(gpu, variant, name, shared)) {
        return Ok(*kernel);
    }
    let cubin = cubin(&variant)?;
    // SAFETY: a whole cubin; the module lives as long as the process.
    let module = unsafe { result::module::load_data(cubin.as_ptr().cast()) }
        .with_context(|| format!("loading the kernels for {variant:?}"))?;
    let symbol = CString::new(name)?;
    // SAFETY: a live module.
    let function = unsafe { result::module::get_function(module, symbol) }
        .with_context(|| format!("finding the kernel `{name}`"))?;
    let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    // SAFETY: a live function.
    unsafe { result::function::set_function_attribute(function, attribute, shared as i32) }
        .with_context(|| format!("giving the kernel `{name}` {shared} bytes of shared memory"))?;
    let kernel = Kernel { function, gpu };
    loaded.insert((gpu, variant, name, shared), kernel);
    Ok(kernel)
}

/// Compute capability of a GPU: (9, 0) is Hopper.
///
/// # Errors
/// The driver fails.
pub fn capability(gpu: usize) -> Result<(u32, u32)> {
    use sys::CUdevice_attribute_enum::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
    };
    static KNOWN: OnceLock<Mutex<HashMap<usize, (u32, u32)>>> = OnceLock::new();
    let mut known = KNOWN.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(capability) = known.get(&gpu) {
        return Ok(*capability);
    }
    result::init().context("the CUDA driver")?;
    let device = result::device::get(gpu as i32).with_context(|| format!("GPU {gpu}"))?;
    // SAFETY: a device that exists.
    let read = |attribute| {
        unsafe { result::device::get_attribute(device, attribute) }.context("its compute capability")
    };
    let capability = (read(MAJOR)? as u32, read(MINOR)? as u32);
    known.insert(gpu, capability);
    Ok(capability)
}

/// Multiprocessors of a GPU.
///
/// # Errors
/// The driver fails.
pub fn multiprocessors(gpu: usize) -> Result<usize> {
    use sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as COUNT;
    static KNOWN: OnceLock<Mutex<HashMap<usize, usize>>> = OnceLock::new();
    let mut known = KNOWN.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(count) = known.get(&gpu) {
        return Ok(*count);
    }
    result::init().context("the CUDA driver")?;
    let device = result::device::get(gpu as i32).with_context(|| format!("GPU {gpu}"))?;
    // SAFETY: a device that exists.
    let count = unsafe { result::device::get_attribute(device, COUNT) }.context("its multiprocessors")?;
    known.insert(gpu, count as usize);
    Ok(count as usize)
}

impl Kernel {
    /// Queue the kernel on libtorch's current stream.
    ///
    /// # Errors
    /// The driver refuses the launch; what fails while the kernel runs is reported by a later call.
    ///
    /// # Safety
    /// `args` must be what the kernel takes, tensors large enough for what it reads and writes.
    pub unsafe fn launch(&self, launch: &Launch, args: &[Arg]) -> Result<()> {
        // SAFETY: as the caller promises.
        unsafe { self.queue(launch, args, false) }
    }

    /// As [`Kernel::launch`], where blocks may take their places while the kernel queued before still runs:
    /// the kernel waits for it itself (`griddepcontrol.wait`) before it reads or writes anything. A plain
    /// launch before Hopper.
    ///
    /// # Errors
    /// As [`Kernel::launch`].
    ///
    /// # Safety
    /// As [`Kernel::launch`]; and the kernel does wait.
    pub unsafe fn launch_early(&self, launch: &Launch, args: &[Arg]) -> Result<()> {
        let early = capability(self.gpu)?.0 >= 9;
        // SAFETY: as the caller promises.
        unsafe { self.queue(launch, args, early) }
    }

    /// # Safety
    /// As [`Kernel::launch`], and where `early` is set as [`Kernel::launch_early`].
    unsafe fn queue(&self, launch: &Launch, args: &[Arg], early: bool) -> Result<()> {
        let _entered = Entered::new(self.gpu)?;
        let stream = Stream::current(Device::Cuda(self.gpu))?.handle()?;
        // Values by which the driver copies the arguments: eight bytes hold any but a struct.
        let mut values: Vec<u64> = args
            .iter()
            .map(|arg| match arg {
                Arg::Tensor(t) => t.data_ptr() as u64,
                Arg::Absent | Arg::Ints(_) => 0,
                Arg::Int(n) => u64::from(*n as u32),
                Arg::Long(n) => *n as u64,
                Arg::Float(x) => u64::from(x.to_bits()),
            })
            .collect();
        let mut pointers: Vec<*mut c_void> = values
            .iter_mut()
            .zip(args)
            .map(|(value, arg)| match arg {
                Arg::Ints(ints) => ints.as_ptr().cast_mut().cast(),
                _ => std::ptr::from_mut(value).cast(),
            })
            .collect();
        let [x, y, z] = launch.grid.map(|n| n as u32);
        let mut overlap = sys::CUlaunchAttribute_st {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue_union { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig_st {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: launch.threads as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared as u32,
            hStream: stream.cast(),
            attrs: &raw mut overlap,
            numAttrs: u32::from(early),
        };
        // SAFETY: the caller's arguments; the stream is libtorch's, of this GPU; all outlives the call, which
        // copies it.
        unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                self.function,
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()
        .context("launching a kernel")
    }
}

/// The GPU's primary context, which is libtorch's too, is this thread's until it is dropped; then the one
/// that was before is again, so that libtorch's idea of the current GPU stays true where a process has
/// several.
struct Entered {
    before: Option<sys::CUcontext>,
}

impl Entered {
    fn new(gpu: usize) -> Result<Self> {
        thread_local! { static CONTEXTS: RefCell<HashMap<usize, sys::CUcontext>> = RefCell::default() }
        let known = CONTEXTS.with_borrow(|contexts| contexts.get(&gpu).copied());
        let context = match known {
            Some(context) => context,
            None => {
                result::init().context("the CUDA driver")?;
                let device = result::device::get(gpu as i32).with_context(|| format!("GPU {gpu}"))?;
                // SAFETY: a device that exists; its primary context is kept for good.
                let context = unsafe { result::primary_ctx::retain(device) }.context("the GPU's context")?;
                CONTEXTS.with_borrow_mut(|contexts| contexts.insert(gpu, context));
                context
            }
        };
        // What is current is asked for every time: libtorch changes it, too.
        let current = result::ctx::get_current().context("the thread's GPU")?;
        if current == Some(context) {
            return Ok(Self { before: None });
        }
        // SAFETY: a live context; setting it current is what CUDA's runtime does too.
        unsafe { result::ctx::set_current(context) }.context("the GPU's context")?;
        // A thread without a context keeps this one, as after the runtime's first call.
        Ok(Self { before: current })
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            // SAFETY: it was current before. It cannot fail for a live context.
            let _ = unsafe { result::ctx::set_current(before) };
        }
    }
}

/// The compiled code, from disk if it was compiled before.
fn cubin(variant: &Variant) -> Result<Vec<u8>> {
    let (source, options) = (variant.source(), variant.options());
    let Some(folder) = folder() else { return compile(&source, &options) };
    crate::shim::check(unsafe { crate::shim::pkv_load_nvrtc() })?;
    let mut hash = Sha256::new();
    hash.update(format!("{:?}\n{options:?}\n{source}", version()));
    let path = folder.join(format!("{:x}.cubin", hash.finalize()));
    if let Ok(bytes) = std::fs::read(&path)
        && bytes.starts_with(b"\x7fELF")
    {
        return Ok(bytes);
    }
    let bytes = compile(&source, &options)?;
    // Only a convenience: where it cannot be written, the next process compiles again.
    if let Err(error) = keep(&path, &bytes) {
        tracing::debug!("not keeping `{}`: {error}", path.display());
    }
    Ok(bytes)
}

fn keep(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    // A name of its own: two processes may compile at once.
    let partial = path.with_extension(format!("{}.tmp", std::process::id()));
    std::fs::write(&partial, bytes)?;
    std::fs::rename(&partial, path)
}

fn folder() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let cache = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")))?;
    Some(cache.join("proxykv-train/cubins"))
}
