// What both files of the shim use.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceType.h>

#include <cstddef>
#include <exception>
#include <vector>

extern "C" void pkv_set_last_error(const char* text);

namespace {

constexpr auto CUDA = c10::DeviceType::CUDA;

// No exception crosses the interface: -1 and the text for `pkv_last_error` instead.
template <class F>
int guard(F&& f) {
  try {
    f();
    return 0;
  } catch (const std::exception& e) {
    pkv_set_last_error(e.what());
    return -1;
  }
}

std::vector<at::Tensor> tensors(at::Tensor** p, size_t n) {
  std::vector<at::Tensor> v;
  v.reserve(n);
  for (size_t i = 0; i < n; i++) v.push_back(*p[i]);
  return v;
}

}  // namespace
