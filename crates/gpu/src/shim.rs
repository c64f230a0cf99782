//! The C interface of `csrc/`, and its errors.

use std::ffi::{CStr, CString, c_char, c_int, c_void};

use anyhow::{Result, bail};
use torch_sys::C_tensor;

/// A tensor of libtorch, or none.
pub type Raw = *mut C_tensor;

/// `c10::Event`, seen from outside.
#[repr(C)]
pub struct RawEvent {
    _opaque: [u8; 0],
}

/// Functions that the shim's cross-attention calls, on whatever thread it runs: 0, or -1 after [`answer`]
/// kept the reason.
#[repr(C)]
pub struct CrossKernels {
    /// Tokens, logit and reading weights, attention heads; scores, and the sums for the backward or null.
    pub forward: unsafe extern "C" fn(Raw, Raw, Raw, i64, Raw, Raw, Raw) -> c_int,
    /// Tokens and both weights, both sums and the output's gradient for every row; the three gradients.
    pub backward: unsafe extern "C" fn(Raw, Raw, Raw, Raw, Raw, Raw, Raw, Raw, Raw) -> c_int,
    /// Logits and readings, which become their gradients; both sums, the output's gradient for every row,
    /// first position.
    pub gradients: unsafe extern "C" fn(Raw, Raw, Raw, Raw, Raw, i64) -> c_int,
}

unsafe extern "C" {
    fn pkv_set_last_error(text: *const c_char);
    fn pkv_last_error() -> *const c_char;
    fn pkv_boot_error() -> *const c_char;
    pub fn pkv_load_nvrtc() -> c_int;
    pub fn pkv_cuda_count() -> c_int;
    pub fn pkv_cuda_sync(device: c_int) -> c_int;
    pub fn pkv_cuda_memory(device: c_int, out: *mut i64) -> c_int;
    pub fn pkv_cuda_reset_peak(device: c_int) -> c_int;
    pub fn pkv_cuda_empty_cache() -> c_int;
    pub fn pkv_upload(host: Raw, device: c_int, out: *mut Raw) -> c_int;
    pub fn pkv_tf32(on: c_int) -> c_int;
    pub fn pkv_fused_adamw(
        n: usize,
        p: *mut Raw,
        g: *mut Raw,
        m: *mut Raw,
        v: *mut Raw,
        steps: *mut Raw,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
    ) -> c_int;
    pub fn pkv_global_norm(n: usize, t: *mut Raw, out: *mut Raw) -> c_int;
    pub fn pkv_scale(n: usize, t: *mut Raw, by: Raw) -> c_int;
    pub fn pkv_flash(
        q: Raw,
        k: Raw,
        v: Raw,
        cu_q: Raw,
        cu_k: Raw,
        used_k: Raw,
        max_q: i64,
        max_k: i64,
        causal: c_int,
        window_left: i64,
        window_right: i64,
        scale: f64,
        out: *mut Raw,
        lse: *mut Raw,
    ) -> c_int;
    pub fn pkv_cudnn_attention(
        q: Raw,
        k: Raw,
        v: Raw,
        causal: c_int,
        scale: f64,
        out: *mut Raw,
        lse: *mut Raw,
    ) -> c_int;
    pub fn pkv_stream_current(device: c_int, id: *mut i64) -> c_int;
    pub fn pkv_stream_pool(device: c_int, high_priority: c_int, id: *mut i64) -> c_int;
    pub fn pkv_stream_exchange(device: c_int, id: i64, previous: *mut i64) -> c_int;
    pub fn pkv_stream_handle(device: c_int, id: i64, handle: *mut *mut c_void) -> c_int;
    pub fn pkv_stream_sync(device: c_int, id: i64) -> c_int;
    pub fn pkv_record_stream(t: Raw, device: c_int, id: i64) -> c_int;
    pub fn pkv_event_new(timed: c_int, out: *mut *mut RawEvent) -> c_int;
    pub fn pkv_event_free(e: *mut RawEvent);
    pub fn pkv_event_record(e: *mut RawEvent, device: c_int, id: i64) -> c_int;
    pub fn pkv_event_block(e: *mut RawEvent, device: c_int, id: i64) -> c_int;
    pub fn pkv_event_sync(e: *mut RawEvent) -> c_int;
    pub fn pkv_event_query(e: *mut RawEvent, done: *mut c_int) -> c_int;
    pub fn pkv_event_elapsed(from: *mut RawEvent, to: *mut RawEvent, ms: *mut f64) -> c_int;
    pub fn pkv_time_conv(x: Raw, weight: Raw, bias: Raw, dilation: i64, out: *mut Raw) -> c_int;
    pub fn pkv_attend_heads(
        tokens: Raw,
        logit: Raw,
        reading: Raw,
        heads: i64,
        piece: i64,
        kernels: *const CrossKernels,
        out: *mut Raw,
    ) -> c_int;
    pub fn pkv_drop_grads(n: usize, t: *mut Raw) -> c_int;
    pub fn pkv_lerp(n: usize, mean: *mut Raw, x: *mut Raw, weight: f64) -> c_int;
    pub fn pkv_pinned(n: i64, out: *mut Raw) -> c_int;
    pub fn pkv_copy_queued(into: Raw, from: Raw) -> c_int;
    pub fn pkv_upload_beside(host: Raw, device: c_int, out: *mut Raw) -> c_int;
}

/// The return code of a function that the shim calls.
pub fn answer(result: Result<()>) -> c_int {
    let Err(error) = result else { return 0 };
    let text = CString::new(format!("{error:#}")).unwrap_or_default();
    // SAFETY: the shim copies the text.
    unsafe { pkv_set_last_error(text.as_ptr()) };
    -1
}

/// Turn the shim's return code into a result; the text is the first line of libtorch's.
pub fn check(code: c_int) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    // SAFETY: the pointer is to a thread-local string that lives until this thread's next shim call.
    let text = unsafe { CStr::from_ptr(pkv_last_error()) }.to_string_lossy();
    bail!("libtorch: {}", text.lines().next().unwrap_or("no reason given"))
}

/// Why the constructor did not load CUDA; empty if it did.
pub fn boot_error() -> String {
    // SAFETY: a static string, written before `main` only.
    unsafe { CStr::from_ptr(pkv_boot_error()) }.to_string_lossy().into_owned()
}
