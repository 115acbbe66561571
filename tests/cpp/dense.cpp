// SPDX-License-Identifier: MIT
#include "dense.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

namespace dense {

bool sees(const Axis& axis, int query, int key) {
  if (axis.window == 0 || query % axis.dilation != key % axis.dilation) return false;
  const int residue = query % axis.dilation;
  const int length = (axis.extent - residue + axis.dilation - 1) / axis.dilation;
  const int window = std::min(axis.window, length);
  const int stride = std::min(axis.stride, window);
  const int p = query / axis.dilation, j = key / axis.dilation;
  const int group_start = p / stride * stride;
  if (axis.causal) {
    const int leader = std::min(group_start + stride - 1, length - 1);
    return std::max(leader - (window - 1), 0) <= j && j <= p;
  }
  const int leader = std::min(group_start + stride / 2, length - 1);
  const int start = std::clamp(leader - window / 2, 0, length - window);
  return start <= j && j < start + window;
}

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct GridKey {
  size_t token = 0, bias = 0;
};

/// One key of one query, wherever it is stored.
struct Key {
  const double *k, *v;
  double *dk, *dv;
  double bias;
  double* dbias;
};

double dot(const double* a, const double* b, int n) {
  double sum = 0.0;
  for (int i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

class Solver {
 public:
  Solver(const Problem& problem, const Inputs& inputs, Rounding rounding)
      : p_(problem), in_(inputs), rounding_(rounding) {
    tokens_ = size_t(p_.axes[0].extent) * size_t(p_.axes[1].extent) * size_t(p_.axes[2].extent);
    const size_t rows = size_t(p_.batch) * tokens_ * size_t(p_.heads);
    res_.out.resize(rows * size_t(p_.head_dim_v));
    res_.lse.resize(rows);
    res_.dq.resize(in_.q.size());
    res_.dk.resize(in_.k.size());
    res_.dv.resize(in_.v.size());
    res_.dbias.resize(in_.bias.size());
    res_.dextra_k.resize(in_.extra_k.size());
    res_.dextra_v.resize(in_.extra_v.size());
  }

  Results run() {
    for (size_t token = 0; token < tokens_; ++token) {
      const std::vector<GridKey> visible = visible_keys(token);
      for (int b = 0; b < p_.batch; ++b)
        for (int h = 0; h < p_.heads; ++h) attend(size_t(b), token, size_t(h), visible);
    }
    for (Array* grad : {&res_.dq, &res_.dk, &res_.dv, &res_.dbias, &res_.dextra_k, &res_.dextra_v})
      for (double& x : *grad) x = rounded(x, rounding_.stored);
    return std::move(res_);
  }

 private:
  static double rounded(double x, Round round) { return round ? round(x) : x; }

  std::vector<GridKey> visible_keys(size_t query) const {
    const int ny = p_.axes[1].extent, nx = p_.axes[2].extent;
    const auto coordinate = [&](size_t token, int axis) {
      const int t = int(token);
      return axis == 0 ? t / (ny * nx) : axis == 1 ? t / nx % ny : t % nx;
    };
    std::vector<GridKey> visible;
    for (size_t key = 0; key < tokens_; ++key) {
      bool seen = true;
      size_t bias = 0;
      for (int a = 0; a < 3 && seen; ++a) {
        const Axis& axis = p_.axes[a];
        const int i = coordinate(query, a), j = coordinate(key, a);
        seen = sees(axis, i, j);
        const int offset = (j - i) / axis.dilation + axis.window - 1;  // (j - i) is a multiple of the dilation
        bias = bias * size_t(std::max(2 * axis.window - 1, 0)) + size_t(offset);
      }
      if (seen) visible.push_back({key, bias});
    }
    return visible;
  }

  std::vector<Key> keys_of(size_t b, size_t h, const std::vector<GridKey>& visible) {
    const size_t d = size_t(p_.head_dim), dv = size_t(p_.head_dim_v), heads_kv = size_t(p_.heads_kv);
    const size_t hkv = h / (size_t(p_.heads) / heads_kv);
    std::vector<Key> keys;
    for (const GridKey& g : visible) {
      const size_t row = (b * tokens_ + g.token) * heads_kv + hkv;
      const size_t bias = g.bias * size_t(p_.heads) + h;
      keys.push_back({&in_.k[row * d], &in_.v[row * dv], &res_.dk[row * d], &res_.dv[row * dv],
                      p_.has_bias ? in_.bias[bias] : 0.0, p_.has_bias ? &res_.dbias[bias] : nullptr});
    }
    for (size_t e = 0; e < size_t(p_.extra_keys); ++e) {
      const size_t row = (b * size_t(p_.extra_keys) + e) * heads_kv + hkv;
      keys.push_back({&in_.extra_k[row * d], &in_.extra_v[row * dv], &res_.dextra_k[row * d], &res_.dextra_v[row * dv],
                      0.0, nullptr});
    }
    return keys;
  }

  void attend(size_t b, size_t token, size_t h, const std::vector<GridKey>& visible) {
    const size_t row = (b * tokens_ + token) * size_t(p_.heads) + h;
    const double* q = &in_.q[row * size_t(p_.head_dim)];
    double* out = &res_.out[row * size_t(p_.head_dim_v)];
    const std::vector<Key> keys = keys_of(b, h, visible);

    Array s(keys.size());
    double row_max = -kInfinity, row_sum = 0.0;
    for (size_t j = 0; j < keys.size(); ++j) {
      s[j] = p_.scale * dot(q, keys[j].k, p_.head_dim) + keys[j].bias;
      row_max = std::max(row_max, s[j]);
      if (std::isfinite(s[j])) res_.max_logit = std::max(res_.max_logit, std::abs(s[j]));
    }
    if (row_max == -kInfinity) {
      res_.lse[row] = -kInfinity;
      return;
    }
    for (double& x : s) row_sum += x = std::exp(x - row_max);
    res_.lse[row] = row_max + std::log(row_sum);
    for (size_t j = 0; j < keys.size(); ++j) {
      s[j] = rounded(s[j] / row_sum, rounding_.scores);
      for (int c = 0; c < p_.head_dim_v; ++c) out[c] += s[j] * keys[j].v[c];
    }
    for (int c = 0; c < p_.head_dim_v; ++c) out[c] = rounded(out[c], rounding_.stored);
    if (!in_.dout.empty()) backward(row, q, out, s, keys);
  }

  void backward(size_t row, const double* q, const double* out, const Array& p, const std::vector<Key>& keys) {
    const double* dout = &in_.dout[row * size_t(p_.head_dim_v)];
    double* dq = &res_.dq[row * size_t(p_.head_dim)];
    const double delta = dot(dout, out, p_.head_dim_v) - (in_.dlse.empty() ? 0.0 : in_.dlse[row]);
    for (size_t j = 0; j < keys.size(); ++j) {
      const Key& key = keys[j];
      const double dp = dot(dout, key.v, p_.head_dim_v);
      const double ds = rounded(p[j] * (dp - delta), rounding_.scores);
      res_.max_dp = std::max(res_.max_dp, std::abs(dp));
      for (int c = 0; c < p_.head_dim; ++c) {
        dq[c] += p_.scale * ds * key.k[c];
        key.dk[c] += p_.scale * ds * q[c];
      }
      for (int c = 0; c < p_.head_dim_v; ++c) key.dv[c] += p[j] * dout[c];
      if (key.dbias) *key.dbias += ds;
    }
  }

  const Problem& p_;
  const Inputs& in_;
  Rounding rounding_;
  size_t tokens_ = 0;
  Results res_;
};

}  // namespace

Results attention(const Problem& problem, const Inputs& inputs, Rounding rounding) {
  return Solver(problem, inputs, rounding).run();
}

}  // namespace dense
