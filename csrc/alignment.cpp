#include "alignment.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <type_traits>
#include <vector>

#include "threads.h"

namespace cdfast {
namespace {

constexpr int kLanes = 8;
constexpr double kTiny = FLT_MIN;  // the smallest normal float32

// One row of S and T over the slots that store it, widened to double.
struct Row {
  int64_t sample;
  int position;
  int width = 0;               // 64 per stored slot
  std::vector<int> slots;      // which slots
  std::vector<double> s, t;    // (width,)
  std::vector<uint8_t> entry;  // whether the row sees the column, for `kl` only

  explicit Row(const Axis& axis)
      : slots(axis.n_slots),
        s(axis.n_slots * kTile),
        t(axis.n_slots * kTile),
        entry(axis.n_slots * kTile) {}
};

int64_t stored_at(const Axis& axis, const Row& row, int slot) {
  return (axis.panel(row.sample, slot)[0] + row.position) * kTile;
}

void read_row(const Axis& axis, const float* map, const float* target, Row* row) {
  row->width = 0;
  for (int slot = 0; slot < axis.n_slots; ++slot) {
    const int64_t* panel = axis.panel(row->sample, slot);
    if (row->position < panel[1] || row->position >= panel[2]) continue;
    row->slots[row->width / kTile] = slot;
    const int64_t at = stored_at(axis, *row, slot);
    for (int j = 0; j < kTile; ++j) {
      row->s[row->width + j] = map[at + j];
      row->t[row->width + j] = target[at + j];
    }
    row->width += kTile;
  }
}

void read_entries(const Axis& axis, Row* row) {
  const int64_t base = axis.token_base(row->sample);
  const int begin = axis.bounds[2 * (base + row->position)];
  for (int c = 0; c < row->width; ++c) {
    const int tile = axis.slot_tiles[row->sample * axis.n_slots + row->slots[c / kTile]];
    const int key = tile * kTile + c % kTile;
    const bool inside = key >= axis.begin(row->sample) && key <= row->position;
    const bool in_range = key < axis.end_prefix(row->sample) || key >= begin;
    const int32_t code = inside && in_range ? axis.codes[base + key] : -1;
    row->entry[c] = code >= 0 && (code & 1) == 1;
  }
}

// Stores what row->s holds, G by then.
void write_row(const Axis& axis, const Row& row, float* map) {
  for (int c = 0; c < row.width; c += kTile) {
    float* to = map + stored_at(axis, row, row.slots[c / kTile]);
    for (int j = 0; j < kTile; ++j) to[j] = static_cast<float>(row.s[c + j]);
  }
}

void clear(Row* row) { std::fill_n(row->s.begin(), row->width, 0.0); }

// sum of term(c) over the row, in lanes: the order is fixed and the loop has no chain of additions.
template <typename Term>
double sum_over(int width, const Term& term) {
  double lane[kLanes] = {};
  for (int c = 0; c < width; c += kLanes) {
    for (int i = 0; i < kLanes; ++i) lane[i] += term(c + i);
  }
  for (int i = 1; i < kLanes; ++i) lane[0] += lane[i];
  return lane[0];
}

// What cosines need of rows, or of whole maps.
struct Norms {
  double max_s = 0, max_t = 0, ss = 0, tt = 0;

  void add(const Norms& other) {
    max_s = std::max(max_s, other.max_s);
    max_t = std::max(max_t, other.max_t);
    ss += other.ss;
    tt += other.tt;
  }
  // No value above the smallest normal number. Largest values may ignore NaN; the sums do not.
  bool zero() const { return std::min(max_s, max_t) < kTiny && !std::isnan(ss + tt); }
};

Norms norms_of(const Row& row) {
  Norms n;
  for (int c = 0; c < row.width; ++c) {
    n.max_s = std::max(n.max_s, row.s[c]);
    n.max_t = std::max(n.max_t, row.t[c]);
  }
  n.ss = sum_over(row.width, [&](int c) { return row.s[c] * row.s[c]; });
  n.tt = sum_over(row.width, [&](int c) { return row.t[c] * row.t[c]; });
  return n;
}

// |S/|S| - T/|T||^2 / 2 over the row: its part of 1 - cos.
double half_distance(const Row& row, const Norms& n) {
  const double inverse_s = 1 / std::sqrt(n.ss), inverse_t = 1 / std::sqrt(n.tt);
  return 0.5 * sum_over(row.width, [&](int c) {
           const double u = row.s[c] * inverse_s - row.t[c] * inverse_t;
           return u * u;
         });
}

// G = weight / |S| (u - (1 - cos) s^), u = s^ - t^.
void cosine_gradient(const Norms& n, double one_minus_cos, double weight, Row* row) {
  const double inverse_s = 1 / std::sqrt(n.ss), inverse_t = 1 / std::sqrt(n.tt);
  for (int c = 0; c < row->width; ++c) {
    const double s_hat = row->s[c] * inverse_s, u = s_hat - row->t[c] * inverse_t;
    row->s[c] = weight * inverse_s * (u - one_minus_cos * s_hat);
  }
}

double row_loss(double weight, Row* row) {
  const Norms n = norms_of(*row);
  if (n.zero()) {
    clear(row);
    return 0;
  }
  const double loss = half_distance(*row, n);
  cosine_gradient(n, loss, weight, row);
  return weight * loss;
}

double mse_row(double weight, Row* row) {
  const double loss = sum_over(row->width, [&](int c) {
    const double u = row->s[c] - row->t[c];
    return u * u;
  });
  for (int c = 0; c < row->width; ++c) row->s[c] = 2 * weight * (row->s[c] - row->t[c]);
  return weight * loss;
}

double kl_row(double weight, Row* row) {
  std::vector<double>& s = row->s;
  const auto floored = [&](int c) { return s[c] < kTiny ? kTiny : s[c]; };
  const auto visible = [&](int c) { return row->entry[c] ? floored(c) : 0.0; };
  const double sum_s = sum_over(row->width, visible);
  const double sum_t = sum_over(row->width, [&](int c) { return row->t[c]; });
  if (sum_t == 0) {
    clear(row);
    return 0;
  }
  const double log_sum_s = std::log(sum_s);
  const double loss = sum_over(row->width, [&](int c) {
    if (!row->entry[c] || row->t[c] == 0) return 0.0;
    const double t_hat = row->t[c] / sum_t;
    return t_hat * (std::log(t_hat) - (std::log(floored(c)) - log_sum_s));
  });
  for (int c = 0; c < row->width; ++c) {
    const bool below = !row->entry[c] || s[c] < kTiny;
    s[c] = below ? 0.0 : weight * (1 / sum_s - row->t[c] / sum_t / s[c]);
  }
  return weight * loss;
}

// Runs body(row) for every live row that sees a visual key, in parallel.
template <typename Body>
void over_rows(const Axis& axis, const float* map, const float* target, int threads,
               const Body& body) {
  struct Piece {
    int64_t sample;
    int begin, end;
  };
  std::vector<Piece> pieces;
  for (int64_t s = 0; s < axis.n_samples; ++s) {
    for (int at = axis.begin(s); at < axis.end(s) && axis.counts[2 * s] > 0; at += kTile) {
      pieces.push_back({s, at, std::min(at + kTile, axis.end(s))});
    }
  }
  std::vector<Row> rows(std::max(threads, 1), Row(axis));
  parallel_for(static_cast<int64_t>(pieces.size()), threads, [&](int64_t i, int worker) {
    Row& row = rows[worker];
    row.sample = pieces[i].sample;
    for (row.position = pieces[i].begin; row.position < pieces[i].end; ++row.position) {
      if (axis.entries[axis.token_base(row.sample) + row.position] == 0) continue;
      read_row(axis, map, target, &row);
      body(&row);
    }
  });
}

// Per-row values summed over each sample, in the order of rows.
template <typename Value>
std::vector<Value> sum_samples(const Axis& axis, const std::vector<Value>& per_row) {
  std::vector<Value> sums(axis.n_samples);
  for (int64_t s = 0; s < axis.n_samples; ++s) {
    const int64_t base = axis.token_base(s);
    for (int i = axis.begin(s); i < axis.end(s); ++i) {
      if constexpr (std::is_same_v<Value, double>) {
        sums[s] += per_row[base + i];
      } else {
        sums[s].add(per_row[base + i]);
      }
    }
  }
  return sums;
}

std::vector<double> by_rows(const Axis& axis, Objective objective, float* map, const float* target,
                            int threads) {
  std::vector<double> losses(axis.n_tokens);
  over_rows(axis, map, target, threads, [&](Row* row) {
    const int64_t token = axis.token_base(row->sample) + row->position;
    const double n_rows = static_cast<double>(axis.counts[2 * row->sample]);
    const double n_entries = static_cast<double>(axis.counts[2 * row->sample + 1]);
    if (objective == Objective::mse) {
      losses[token] = mse_row(1 / n_entries, row);
    } else if (axis.entries[token] < 2) {
      clear(row);
    } else if (objective == Objective::row) {
      losses[token] = row_loss(1 / n_rows, row);
    } else {
      read_entries(axis, row);
      losses[token] = kl_row(1 / n_rows, row);
    }
    write_row(axis, *row, map);
  });
  return sum_samples(axis, losses);
}

std::vector<double> whole_maps(const Axis& axis, float* map, const float* target, int threads) {
  const auto token = [&](const Row& row) { return axis.token_base(row.sample) + row.position; };
  std::vector<Norms> row_norms(axis.n_tokens);
  over_rows(axis, map, target, threads, [&](Row* row) { row_norms[token(*row)] = norms_of(*row); });
  const std::vector<Norms> norms = sum_samples(axis, row_norms);
  std::vector<double> row_losses(axis.n_tokens);
  over_rows(axis, map, target, threads, [&](Row* row) {
    const Norms& n = norms[row->sample];
    row_losses[token(*row)] = n.zero() ? 0 : half_distance(*row, n);
  });
  const std::vector<double> losses = sum_samples(axis, row_losses);
  over_rows(axis, map, target, threads, [&](Row* row) {
    const Norms& n = norms[row->sample];
    if (n.zero()) {
      clear(row);
    } else {
      cosine_gradient(n, losses[row->sample], 1, row);
    }
    write_row(axis, *row, map);
  });
  return losses;
}

}  // namespace

// pooled.cpp
std::vector<double> pooled_maps(const Axis& axis, float* map, const float* target, int threads);

void alignment(const Axis& axis, Objective objective, float* map, const float* target, float* loss,
               int threads) {
  std::vector<double> losses;
  if (objective == Objective::map) {
    losses = whole_maps(axis, map, target, threads);
  } else if (objective == Objective::pooled) {
    losses = pooled_maps(axis, map, target, threads);
  } else {
    losses = by_rows(axis, objective, map, target, threads);
  }
  for (int64_t s = 0; s < axis.n_samples; ++s) loss[s] = static_cast<float>(losses[s]);
}

}  // namespace cdfast
