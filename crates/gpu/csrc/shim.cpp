// What tch 0.24 cannot reach of libtorch 2.11, behind a C interface.
//
// No CUDA header and no link-time CUDA symbol: the same binary starts on machines with and
// without a driver. Every function returns 0, or -1 with the reason in pkv_last_error().
#include "common.h"

#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention.h>
#include <ATen/ops/stack.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cstdlib>
#include <dlfcn.h>
#include <string>
#include <vector>

namespace {

thread_local std::string last_error;
std::string boot_error;

c10::impl::VirtualGuardImpl cuda() { return c10::impl::VirtualGuardImpl(CUDA); }

c10::Device gpu(int index) { return c10::Device(CUDA, (c10::DeviceIndex)index); }

// Streams cross the interface as libtorch's own numbers for them.
c10::Stream stream(int device, int64_t id) { return c10::Stream(c10::Stream::UNSAFE, gpu(device), id); }

std::optional<int64_t> window(int64_t n) { return n < 0 ? std::nullopt : std::optional<int64_t>(n); }

// The folder of libtorch's libraries, with a slash; empty if it cannot be told.
std::string torch_libraries() {
  Dl_info info;
  if (!dladdr((void*)&at::globalContext, &info)) return "";
  std::string lib(info.dli_fname);
  lib.resize(lib.rfind('/') + 1);
  return lib;
}

// NVRTC opens its builtins by bare name; loaded first by full path, they are found. Where the wheels lie elsewhere, the
// loader's own path is tried.
bool load_nvrtc(const std::string& lib) {
  const std::string nv = lib + "../../nvidia/cu13/lib/";
  bool loaded = false;
  for (const char* so : {"libnvrtc-builtins.so.13.0", "libnvrtc.so.13"})
    loaded = dlopen((nv + so).c_str(), RTLD_LAZY | RTLD_GLOBAL) || dlopen(so, RTLD_LAZY | RTLD_GLOBAL);
  return loaded;
}

} // namespace

// Before main(), because libtorch asks once whether CUDA is there and remembers the answer. The
// linker drops libtorch_cuda from binaries that name no symbol of it, so it is loaded by hand.
// PKV_CUDA=0 never, PKV_CUDA=1 always, unset: when a driver is installed.
__attribute__((constructor)) static void pkv_boot() {
  const char* wish = getenv("PKV_CUDA");
  if (wish && *wish == '0') {
    boot_error = "PKV_CUDA=0 is set";
    return;
  }
  if (!(wish && *wish == '1') && !dlopen("libcuda.so.1", RTLD_LAZY)) {
    boot_error = "no NVIDIA driver: libcuda.so.1 is not found";
    return;
  }
  const std::string lib = torch_libraries();
  load_nvrtc(lib);
  if (!dlopen((lib + "libtorch_cuda.so").c_str(), RTLD_NOW | RTLD_GLOBAL)) boot_error = dlerror();
}

extern "C" {

const char* pkv_last_error() { return last_error.c_str(); }

// For the project's other C++ files.
void pkv_set_last_error(const char* text) { last_error = text; }

// Why CUDA was not loaded; empty if it was.
const char* pkv_boot_error() { return boot_error.c_str(); }

// Make NVRTC's symbols findable by its bare name; needs no driver.
int pkv_load_nvrtc() {
  static const bool loaded = load_nvrtc(torch_libraries());
  if (!loaded) last_error = "libnvrtc.so.13 is not found";
  return loaded ? 0 : -1;
}

int pkv_cuda_count() { return c10::impl::hasDeviceGuardImpl(CUDA) ? (int)c10::impl::VirtualGuardImpl(CUDA).deviceCount() : 0; }

int pkv_cuda_sync(int device) {
  return guard([&] { c10::impl::VirtualGuardImpl(CUDA).synchronizeDevice((c10::DeviceIndex)device); });
}

// out: allocated now, allocated peak, reserved now, reserved peak, free on the device, total on it; bytes.
int pkv_cuda_memory(int device, int64_t* out) {
  return guard([&] {
    at::globalContext().lazyInitDevice(CUDA);
    auto* allocator = at::getDeviceAllocator(CUDA);
    auto stats = allocator->getDeviceStats((c10::DeviceIndex)device);
    auto info = allocator->getMemoryInfo((c10::DeviceIndex)device);
    out[0] = stats.allocated_bytes[0].current;
    out[1] = stats.allocated_bytes[0].peak;
    out[2] = stats.reserved_bytes[0].current;
    out[3] = stats.reserved_bytes[0].peak;
    out[4] = (int64_t)info.first;
    out[5] = (int64_t)info.second;
  });
}

int pkv_cuda_reset_peak(int device) {
  return guard([&] { at::getDeviceAllocator(CUDA)->resetPeakStats((c10::DeviceIndex)device); });
}

int pkv_cuda_empty_cache() {
  return guard([] { at::getDeviceAllocator(CUDA)->emptyCache(); });
}

// A host tensor on a GPU through pinned memory, without the host waiting; the caller owns out.
int pkv_upload(at::Tensor* host, int device, at::Tensor** out) {
  return guard([&] {
    // libtorch keeps the pinned block until the copy is done.
    *out = new at::Tensor(host->pin_memory().to(gpu(device), host->scalar_type(), /*non_blocking=*/true));
  });
}

int pkv_tf32(int on) {
  return guard([&] {
    at::globalContext().setAllowTF32CuBLAS(on != 0);
    at::globalContext().setAllowTF32CuDNN(on != 0);
  });
}

// One AdamW step on n parameters, in place. steps: float32 tensors that hold the step's number.
int pkv_fused_adamw(size_t n, at::Tensor** p, at::Tensor** g, at::Tensor** m, at::Tensor** v, at::Tensor** steps, double lr,
                    double beta1, double beta2, double weight_decay, double eps) {
  return guard([&] {
    at::_fused_adamw_(tensors(p, n), tensors(g, n), tensors(m, n), tensors(v, n), {}, tensors(steps, n), lr, beta1, beta2,
                      weight_decay, eps, /*amsgrad=*/false, /*maximize=*/false);
  });
}

// The 2-norm of all tensors together, a scalar on their device; the caller owns it.
int pkv_global_norm(size_t n, at::Tensor** t, at::Tensor** out) {
  return guard([&] { *out = new at::Tensor(at::stack(at::_foreach_norm(tensors(t, n), 2)).norm()); });
}

// Every tensor times the scalar tensor, in place.
int pkv_scale(size_t n, at::Tensor** t, at::Tensor* by) {
  return guard([&] { at::_foreach_mul_(tensors(t, n), *by); });
}

// FlashAttention-2 on bf16 or f16; causal is bottom-right, query heads share KV heads.
// Dense: q [B, S, H, D], k and v [B, K, H', D], cu_q and cu_k null; lse [B, H, S].
// Packed: q [T, H, D], k and v [T', H', D], cu_q and cu_k int32 [segments + 1]; lse [H, T].
// used_k: int32 [segments], how many keys of each packed segment there are, or null for all.
// A negative window is unlimited. scale: what products of queries and keys are multiplied with. The caller owns out and lse.
int pkv_flash(at::Tensor* q, at::Tensor* k, at::Tensor* v, at::Tensor* cu_q, at::Tensor* cu_k, at::Tensor* used_k,
              int64_t max_q, int64_t max_k, int causal, int64_t window_left, int64_t window_right, double scale,
              at::Tensor** out, at::Tensor** lse) {
  return guard([&] {
    auto cu = [](at::Tensor* t) { return t ? std::optional<at::Tensor>(*t) : std::nullopt; };
    auto r = at::_flash_attention_forward(*q, *k, *v, cu(cu_q), cu(cu_k), max_q, max_k, /*dropout_p=*/0.0, causal != 0,
                                          /*return_debug_mask=*/false, /*scale=*/scale,
                                          window(window_left), window(window_right), cu(used_k));
    *out = new at::Tensor(std::get<0>(r));
    *lse = new at::Tensor(std::get<1>(r));
  });
}

// cuDNN attention on bf16 or f16: q [B, H, S, D], k and v [B, H', K, D], any strides with D innermost;
// causal is top-left. lse: [B, H, S, 1]. The caller owns out and lse.
int pkv_cudnn_attention(at::Tensor* q, at::Tensor* k, at::Tensor* v, int causal, double scale, at::Tensor** out,
                          at::Tensor** lse) {
  return guard([&] {
    auto r = at::_scaled_dot_product_cudnn_attention(*q, *k, *v, /*attn_bias=*/{}, /*compute_log_sumexp=*/true,
                                                     /*dropout_p=*/0.0, causal != 0, /*return_debug_mask=*/false, scale);
    *out = new at::Tensor(std::get<0>(r));
    *lse = new at::Tensor(std::get<1>(r));
  });
}

int pkv_stream_current(int device, int64_t* id) {
  return guard([&] { *id = cuda().getStream(gpu(device)).id(); });
}

int pkv_stream_pool(int device, int high_priority, int64_t* id) {
  return guard([&] { *id = cuda().getStreamFromGlobalPool(gpu(device), high_priority != 0).id(); });
}

// Make a stream this thread's current one on its device; previous: the one that was.
int pkv_stream_exchange(int device, int64_t id, int64_t* previous) {
  return guard([&] { *previous = cuda().exchangeStream(stream(device, id)).id(); });
}

// The cudaStream_t.
int pkv_stream_handle(int device, int64_t id, void** handle) {
  return guard([&] { *handle = cuda().getStreamNativeHandle(stream(device, id)); });
}

int pkv_stream_sync(int device, int64_t id) {
  return guard([&] { cuda().synchronizeStream(stream(device, id)); });
}

// Keep the tensor's memory from reuse until what is queued on the stream at its release is done.
int pkv_record_stream(at::Tensor* t, int device, int64_t id) {
  return guard([&] { t->record_stream(stream(device, id)); });
}

// The caller frees it with pkv_event_free.
int pkv_event_new(int timed, c10::Event** out) {
  return guard([&] {
    *out = new c10::Event(CUDA, timed ? c10::EventFlag::BACKEND_DEFAULT : c10::EventFlag::PYTORCH_DEFAULT);
  });
}

void pkv_event_free(c10::Event* e) { delete e; }

int pkv_event_record(c10::Event* e, int device, int64_t id) {
  return guard([&] { e->record(stream(device, id)); });
}

// Work queued on the stream from now on waits for the event; nothing if it was never recorded.
int pkv_event_block(c10::Event* e, int device, int64_t id) {
  return guard([&] { e->block(stream(device, id)); });
}

int pkv_event_sync(c10::Event* e) {
  return guard([&] { e->synchronize(); });
}

int pkv_event_query(c10::Event* e, int* done) {
  return guard([&] { *done = e->query(); });
}

// Milliseconds between two timed events that have both passed.
int pkv_event_elapsed(c10::Event* from, c10::Event* to, double* ms) {
  return guard([&] { *ms = from->elapsedTime(*to); });
}
}
