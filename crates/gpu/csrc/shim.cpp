// What tch 0.24 cannot reach of libtorch 2.11, behind a C interface.
//
// No CUDA header and no link-time CUDA symbol: the same binary starts on machines with and
// without a driver. Every function returns 0, or -1 with the reason in pkv_last_error().
#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/stack.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cstdlib>
#include <dlfcn.h>
#include <string>
#include <vector>

namespace {

thread_local std::string last_error;
std::string boot_error;

template <class F>
int guard(F&& f) {
  try {
    f();
    return 0;
  } catch (const std::exception& e) {
    last_error = e.what();
    return -1;
  }
}

constexpr auto CUDA = c10::DeviceType::CUDA;

std::vector<at::Tensor> tensors(at::Tensor** p, size_t n) {
  std::vector<at::Tensor> v;
  v.reserve(n);
  for (size_t i = 0; i < n; i++) v.push_back(*p[i]);
  return v;
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
  Dl_info info;
  if (!dladdr((void*)&at::globalContext, &info)) return;
  std::string lib(info.dli_fname);
  lib.resize(lib.rfind('/') + 1);
  // NVRTC opens its builtins by bare name; loaded first by full path, they are found.
  const std::string nv = lib + "../../nvidia/cu13/lib/";
  for (const auto& so : {nv + "libnvrtc-builtins.so.13.0", nv + "libnvrtc.so.13"})
    dlopen(so.c_str(), RTLD_LAZY | RTLD_GLOBAL);
  if (!dlopen((lib + "libtorch_cuda.so").c_str(), RTLD_NOW | RTLD_GLOBAL)) boot_error = dlerror();
}

extern "C" {

const char* pkv_last_error() { return last_error.c_str(); }

// For the project's other C++ files.
void pkv_set_last_error(const char* text) { last_error = text; }

// Why CUDA was not loaded; empty if it was.
const char* pkv_boot_error() { return boot_error.c_str(); }

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

int pkv_deterministic(int on) {
  return guard([&] { at::globalContext().setDeterministicAlgorithms(on != 0, /*warn_only=*/false); });
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
}
