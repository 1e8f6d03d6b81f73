// The authors' loss: 1 - cos of column means over visual rows, after their filter of large entries.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <vector>

#include "problem.h"
#include "threads.h"

namespace cdfast {
namespace {

// Calls body(column, at) for what a sample stores of its visual rows: the column among the slots'
// 64 each, and the place in the data of the map.
template <typename Body>
void over_visual_rows(const Axis& axis, int64_t s, const Body& body) {
  const int32_t* codes = axis.codes + axis.token_base(s);
  for (int slot = 0; slot < axis.n_slots; ++slot) {
    const int64_t* panel = axis.panel(s, slot);
    for (int64_t p = panel[1]; p < panel[2]; ++p) {
      if (codes[p] < 0 || (codes[p] & 1) == 0) continue;
      for (int j = 0; j < kTile; ++j) body(slot * kTile + j, (panel[0] + p) * kTile + j);
    }
  }
}

// mean + unbiased std over the visual x visual square, entries that are not visible included as 0.
double threshold(const Axis& axis, int64_t s, const float* x, double n_visual) {
  const double n = n_visual * n_visual;
  double sum = 0, deviation = 0, n_stored = 0;
  over_visual_rows(axis, s, [&](int, int64_t at) { sum += x[at]; });
  const double mean = sum / std::max(n, 1.0);
  over_visual_rows(axis, s, [&](int, int64_t at) {
    const double d = x[at] - mean;
    deviation += d * d;
    n_stored += 1;
  });
  // Columns of a slot that are not visual were counted, entries without a place were not.
  deviation += (n - n_stored) * mean * mean;
  return mean + std::sqrt(std::max(deviation, 0.0) / std::max(n - 1, 1.0));
}

double pooled_sample(const Axis& axis, int64_t s, float* map, const float* target) {
  const auto clear_map = [&](float value) {
    for (int slot = 0; slot < axis.n_slots; ++slot) {
      const int64_t* panel = axis.panel(s, slot);
      float* first = map + (panel[0] + panel[1]) * kTile;
      std::fill(first, first + (panel[2] - panel[1]) * kTile, value);
    }
  };
  const int32_t* codes = axis.codes + axis.token_base(s);
  double n_visual = 0;
  for (int i = axis.begin(s); i < axis.end(s); ++i) n_visual += codes[i] >= 0 && (codes[i] & 1);
  if (n_visual < 2) {
    clear_map(0);
    return 0;
  }
  const double keep_s = threshold(axis, s, map, n_visual);
  const double keep_t = threshold(axis, s, target, n_visual);
  if (std::isnan(keep_s + keep_t)) {
    clear_map(std::numeric_limits<float>::quiet_NaN());
    return std::numeric_limits<double>::quiet_NaN();
  }
  const auto kept = [&](int64_t at) {
    return map[at] <= keep_s && target[at] <= keep_t && target[at] != 0;
  };
  const int64_t width = axis.n_slots * kTile;
  std::vector<double> pooled_s(width), pooled_t(width), count(width);
  over_visual_rows(axis, s, [&](int column, int64_t at) {
    if (!kept(at)) return;
    pooled_s[column] += map[at];
    pooled_t[column] += target[at];
    count[column] += 1;
  });
  double ss = 0, tt = 0, max_s = 0, max_t = 0;
  for (int64_t c = 0; c < width; ++c) {
    pooled_s[c] /= std::max(count[c], 1.0);
    pooled_t[c] /= std::max(count[c], 1.0);
    ss += pooled_s[c] * pooled_s[c];
    tt += pooled_t[c] * pooled_t[c];
    max_s = std::max(max_s, pooled_s[c]);
    max_t = std::max(max_t, pooled_t[c]);
  }
  if (std::min(max_s, max_t) < FLT_MIN) {
    // The authors' cosine is 0 where nothing survives the filter: loss 1, without a gradient.
    clear_map(0);
    return 1;
  }
  const double inverse_s = 1 / std::sqrt(ss), inverse_t = 1 / std::sqrt(tt);
  double loss = 0;
  for (int64_t c = 0; c < width; ++c) {
    const double u = pooled_s[c] * inverse_s - pooled_t[c] * inverse_t;
    loss += u * u / 2;
  }
  for (int64_t c = 0; c < width; ++c) {
    const double s_hat = pooled_s[c] * inverse_s, u = s_hat - pooled_t[c] * inverse_t;
    pooled_s[c] = inverse_s * (u - loss * s_hat) / std::max(count[c], 1.0);
  }
  // G of visual rows in place of S; all other rows have none.
  for (int slot = 0; slot < axis.n_slots; ++slot) {
    const int64_t* panel = axis.panel(s, slot);
    for (int64_t p = panel[1]; p < panel[2]; ++p) {
      const bool visual = codes[p] >= 0 && (codes[p] & 1);
      for (int j = 0; j < kTile; ++j) {
        const int64_t at = (panel[0] + p) * kTile + j;
        const bool has_g = visual && kept(at);
        map[at] = has_g ? static_cast<float>(pooled_s[slot * kTile + j]) : 0.0f;
      }
    }
  }
  return loss;
}

}  // namespace

std::vector<double> pooled_maps(const Axis& axis, float* map, const float* target, int threads) {
  std::vector<double> losses(axis.n_samples);
  parallel_for(axis.n_samples, threads,
               [&](int64_t s, int) { losses[s] = pooled_sample(axis, s, map, target); });
  return losses;
}

}  // namespace cdfast
