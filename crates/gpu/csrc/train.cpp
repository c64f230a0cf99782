// What a training step needs beyond tch: layers with a backward of their own, list-wise optimizer
// operations, pinned memory and copies on a second stream. Same rules as shim.cpp.
#include "common.h"

#include <ATen/ATen.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_lerp.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <stdexcept>
#include <vector>

extern "C" const char* pkv_last_error();

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// [rows, t, c] to [rows, t, taps x c]: the positions that a centred kernel sees, side by side, zeros beyond both ends.
at::Tensor side_by_side(const at::Tensor& x, int64_t taps, int64_t dilation) {
  const int64_t t = x.size(1), reach = taps / 2 * dilation;
  const auto wide = at::constant_pad_nd(x, {0, 0, reach, reach});
  std::vector<at::Tensor> parts;
  for (int64_t i = 0; i < taps; i++) parts.push_back(wide.narrow(1, i * dilation, t));
  return at::cat(parts, 2);
}

// Convolution over time as one matrix product; x [rows, t, in], weight [out, in, taps], bias [out].
// The backward is two more: along the input with the taps turned around, and along the weight. The
// taps are laid side by side again there, so that only x is kept.
struct TimeConv : Function<TimeConv> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                            int64_t dilation) {
    ctx->save_for_backward({x, weight});
    ctx->saved_data["dilation"] = dilation;
    return at::linear(side_by_side(x, weight.size(2), dilation), weight.transpose(1, 2).flatten(1), bias);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto &x = saved[0], &weight = saved[1], &g = grads[0];
    const int64_t dilation = ctx->saved_data["dilation"].toInt(), taps = weight.size(2), out = weight.size(0), in = weight.size(1);
    const auto turned = weight.flip({2}).permute({1, 2, 0}).flatten(1);
    auto dx = at::linear(side_by_side(g, taps, dilation), turned);
    auto dw = at::mm(g.reshape({-1, out}).t(), side_by_side(x, taps, dilation).flatten(0, 1));
    return {dx, dw.view({out, taps, in}).transpose(1, 2).contiguous(), g.sum(at::IntArrayRef({0, 1})), at::Tensor()};
  }
};

// Our own kernels for stage 3, as gpu/src/kernels/cross.rs offers them: 0, or -1 with the reason in pkv_last_error().
using CrossForward = int (*)(at::Tensor* tokens, at::Tensor* logit, at::Tensor* reading, int64_t heads, at::Tensor* scores,
                             at::Tensor* sums, at::Tensor* lse2);
using CrossBackward = int (*)(at::Tensor* tokens, at::Tensor* logit, at::Tensor* reading, at::Tensor* sums, at::Tensor* lse2,
                              at::Tensor* g, at::Tensor* dtokens, at::Tensor* dlogit, at::Tensor* dreading);
using CrossGradients = int (*)(at::Tensor* logits, at::Tensor* readings, at::Tensor* sums, at::Tensor* lse2, at::Tensor* g,
                               int64_t start);

struct CrossKernels {
  CrossForward forward;
  // All of it, 16 bits.
  CrossBackward backward;
  // What lies between libtorch's products of a piece, f32.
  CrossGradients gradients;
};

void must(int code) {
  if (code != 0) throw std::runtime_error(pkv_last_error());
}

struct Attended {
  at::Tensor weights, readings;
};

// tokens [b, p, t, d] to attention weights over p and readings, both [b, p, t, r].
Attended attend(const at::Tensor& tokens, const at::Tensor& logit, const at::Tensor& reading) {
  return {at::linear(tokens, logit).softmax(1), at::linear(tokens, reading)};
}

// Gradients of logits and readings, [b, p, t, r], of the positions of `part`, which begin at `start`.
struct Gradients {
  at::Tensor logits, readings;
};

Gradients plain_gradients(const at::Tensor& part, const at::Tensor& logit, const at::Tensor& reading, at::Tensor g, int64_t start,
                          int64_t heads) {
  const auto kind = part.scalar_type();
  const int64_t b = part.size(0), t = part.size(2), r = logit.size(0);
  auto a = attend(part, logit, reading);
  // s = sum_p w v, so dv = w ds and dl = w (v - s) ds = dv (v - s).
  const auto s = (a.weights * a.readings).sum(at::IntArrayRef({1}), true, at::kFloat).to(kind);
  const auto ds = g.narrow(1, start, t).to(kind).unsqueeze(2).expand({b, t, heads, -1}).reshape({b, 1, t, r});
  const auto dv = a.weights.mul_(ds);
  return {a.readings.sub_(s).mul_(dv), dv};
}

// sum over p of softmax_p(tokens logit^T) x (tokens reading^T), then over attention heads: [b, t, o], f32.
//
// Weights and readings are p x r numbers per position, where the result is o. Our kernels never hold them; without the
// kernels, and in the backward of f32, they are made piece by piece along t, so that training keeps the tokens, and with
// the kernels the sums over p, alone.
struct AttendHeads : Function<AttendHeads> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& tokens, const at::Tensor& logit, const at::Tensor& reading,
                            int64_t heads, int64_t piece, const CrossKernels* kernels, bool trains) {
    ctx->saved_data["heads"] = heads;
    ctx->saved_data["piece"] = piece;
    ctx->saved_data["kernels"] = (int64_t)kernels;
    if (kernels) {
      auto whole = tokens.contiguous(), l = logit.contiguous(), v = reading.contiguous();
      const int64_t b = tokens.size(0), t = tokens.size(2), r = logit.size(0);
      const auto options = tokens.options().dtype(at::kFloat);
      auto scores = at::empty({b, t, r / heads}, options), sums = at::Tensor(), lse2 = at::Tensor();
      if (trains) sums = at::empty({b, t, r}, options), lse2 = at::empty({b, t, r}, options);
      must(kernels->forward(&whole, &l, &v, heads, &scores, trains ? &sums : nullptr, trains ? &lse2 : nullptr));
      if (trains) ctx->save_for_backward({whole, l, v, sums, lse2});
      return scores;
    }
    ctx->save_for_backward({tokens, logit, reading});
    std::vector<at::Tensor> scores;
    for (const auto& part : tokens.split(piece, 2)) {
      auto a = attend(part, logit, reading);
      const auto sum = a.weights.mul_(a.readings).sum(at::IntArrayRef({1}), false, at::kFloat);
      scores.push_back(sum.unflatten(2, {heads, -1}).sum(at::IntArrayRef({2})));
    }
    return scores.size() == 1 ? scores[0] : at::cat(scores, 1);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    auto tokens = saved[0], logit = saved[1], reading = saved[2];
    const auto& g = grads[0];
    const int64_t heads = ctx->saved_data["heads"].toInt(), piece = ctx->saved_data["piece"].toInt();
    const auto* kernels = (const CrossKernels*)ctx->saved_data["kernels"].toInt();
    const int64_t d = tokens.size(3), r = logit.size(0);
    const auto kind = tokens.scalar_type();
    auto dtokens = at::empty_like(tokens, at::MemoryFormat::Contiguous);
    auto dlogit = at::zeros_like(logit, logit.options().dtype(at::kFloat)), dreading = at::zeros_like(dlogit);
    at::Tensor sums, lse2, wide;
    if (kernels) sums = saved[3], lse2 = saved[4], wide = g.repeat({1, 1, heads});
    if (kernels && kind != at::kFloat) {
      must(kernels->backward(&tokens, &logit, &reading, &sums, &lse2, &wide, &dtokens, &dlogit, &dreading));
      return {dtokens, dlogit.to(kind), dreading.to(kind), at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
    }
    for (int64_t start = 0; start < tokens.size(2); start += piece) {
      const int64_t t = std::min(piece, tokens.size(2) - start);
      const auto part = tokens.narrow(2, start, t).contiguous();
      Gradients of;
      if (kernels) {
        of = {at::linear(part, logit), at::linear(part, reading)};
        must(kernels->gradients(&of.logits, &of.readings, &sums, &lse2, &wide, start));
      } else {
        of = plain_gradients(part, logit, reading, g, start, heads);
      }
      const auto dl = of.logits.view({-1, r}), dv = of.readings.view({-1, r}), flat = part.view({-1, d});
      const auto dpart = at::addmm(at::mm(dl, logit), dv, reading);
      dtokens.narrow(2, start, t).copy_(dpart.view(part.sizes()));
      dlogit.add_(at::mm(dl.t(), flat));
      dreading.add_(at::mm(dv.t(), flat));
    }
    return {dtokens, dlogit.to(kind), dreading.to(kind), at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

} // namespace

extern "C" {

int pkv_time_conv(at::Tensor* x, at::Tensor* weight, at::Tensor* bias, int64_t dilation, at::Tensor** out) {
  return guard([&] { *out = new at::Tensor(TimeConv::apply(*x, *weight, *bias, dilation)); });
}

// `kernels` is null, or lives for ever.
int pkv_attend_heads(at::Tensor* tokens, at::Tensor* logit, at::Tensor* reading, int64_t heads, int64_t piece,
                     const CrossKernels* kernels, at::Tensor** out) {
  const bool trains = at::GradMode::is_enabled();
  return guard([&] {
    *out = new at::Tensor(AttendHeads::apply(*tokens, *logit, *reading, heads, piece, kernels, trains));
  });
}

// Every tensor's gradient becomes undefined: the next backward hands its own over instead of adding.
int pkv_drop_grads(size_t n, at::Tensor** t) {
  return guard([&] {
    for (size_t i = 0; i < n; i++) t[i]->mutable_grad().reset();
  });
}

// mean += weight (x - mean), tensor by tensor, in place.
int pkv_lerp(size_t n, at::Tensor** mean, at::Tensor** x, double weight) {
  return guard([&] { at::_foreach_lerp_(tensors(mean, n), tensors(x, n), at::Scalar(weight)); });
}

// n f32 numbers in page-locked host memory, not initialized; the caller owns the tensor.
int pkv_pinned(int64_t n, at::Tensor** out) {
  return guard([&] { *out = new at::Tensor(at::empty({n}, at::TensorOptions().dtype(at::kFloat).pinned_memory(true))); });
}

// Copy a pinned tensor on the current stream of the other's device, without the host waiting; numbers of another type are
// converted there.
int pkv_copy_queued(at::Tensor* into, at::Tensor* from) {
  return guard([&] {
    const bool same = into->scalar_type() == from->scalar_type();
    into->copy_(same ? *from : from->to(into->device(), /*non_blocking=*/true), /*non_blocking=*/true);
  });
}

// A copy of a pinned tensor on the device, made on a stream of its own. What the caller queues from now
// on waits for it; what was queued before runs beside it.
int pkv_upload_beside(at::Tensor* host, int device, at::Tensor** out) {
  return guard([&] {
    const c10::Device on(CUDA, (c10::DeviceIndex)device);
    const c10::impl::VirtualGuardImpl impl(CUDA);
    thread_local std::optional<c10::Stream> side;
    if (!side || side->device() != on) side = impl.getStreamFromGlobalPool(on);
    const auto compute = impl.exchangeStream(*side);
    at::Tensor copy;
    c10::Event copied(CUDA);
    try {
      copy = host->to(on, /*non_blocking=*/true);
      copied.record(*side);
    } catch (...) {
      impl.exchangeStream(compute);
      throw;
    }
    impl.exchangeStream(compute);
    copied.block(compute);
    // Its memory belongs to the side stream, which must not reuse it before the caller's work is done.
    copy.record_stream(compute);
    *out = new at::Tensor(copy);
  });
}
}
