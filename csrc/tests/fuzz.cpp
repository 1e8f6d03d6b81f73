// Random layouts through the scheduler and every pass, for the sanitizers: fuzz [first] [last]
//
// Buffers have their exact sizes and are filled with NaN, so that a read outside, an output that is
// skipped and a use of padding are seen. Values are held against loops that share no code with
// csrc/.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../alignment.h"
#include "../attention.h"
#include "../layout.h"
#include "../visibility.h"

using namespace cdfast;

namespace {

const float kNan = std::numeric_limits<float>::quiet_NaN();
int seed = 0;

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "seed %d: %s\n", seed, what);
  std::exit(1);
}

struct Random {
  std::mt19937 bits;
  int number(int low, int high) { return std::uniform_int_distribution<int>(low, high)(bits); }
  bool chance(double p) { return std::bernoulli_distribution(p)(bits); }
  float normal() { return std::normal_distribution<float>()(bits); }
};

// The inputs of a layout, and its tables.
struct Batch {
  bool packed = false;
  int64_t n_samples = 0, length = 0, n_tokens = 0;
  std::vector<uint8_t> visual, live;
  std::vector<int64_t> segment, starts;
  std::vector<uint8_t> view_live, view_visual, image_samples;
  std::vector<int64_t> view_segment, gather, scatter, start, counts, panels, tiles;
  std::vector<int32_t> samples, codes, bounds, entries, slot_tiles;
  Axis axis;

  int64_t begin(int64_t s) const { return packed ? starts[s] : 0; }
  int64_t size(int64_t s) const { return packed ? starts[s + 1] - starts[s] : length; }
  int64_t token(int64_t s, int64_t position) const {
    return packed ? position : s * length + position;
  }
  // The rule of layout.py; i and j are positions of one sample.
  bool visible(int64_t s, int64_t i, int64_t j) const {
    const int64_t a = token(s, i), b = token(s, j);
    return j <= i && live[a] && live[b] && (segment[a] == segment[b] || segment[b] == 0);
  }
};

void draw(Random& random, Batch* batch) {
  batch->packed = random.chance(0.3);
  batch->n_samples = random.number(0, 3);
  batch->starts = {0};
  const int longest = random.chance(0.3) ? 200 : 70;
  batch->length = random.number(0, longest);
  for (int64_t s = 0; s < batch->n_samples; ++s) {
    const int64_t n = batch->packed ? random.number(0, longest) : batch->length;
    batch->starts.push_back(batch->starts.back() + n);
  }
  if (batch->packed) {
    batch->length = 0;
    for (int64_t s = 0; s < batch->n_samples; ++s) {
      batch->length = std::max(batch->length, batch->size(s));
    }
  }
  batch->n_tokens = batch->starts.back();
  const double visual = random.chance(0.5) ? 0.05 : 0.8;
  const double steps = random.chance(0.5) ? 0 : 0.05;
  const bool with_prefix = random.chance(0.5);
  for (int64_t s = 0; s < batch->n_samples; ++s) {
    int64_t id = with_prefix ? 0 : 1;
    const int64_t n = batch->starts[s + 1] - batch->starts[s];
    const int64_t first = random.number(0, static_cast<int>(n)),
                  last = random.number(0, static_cast<int>(n));
    const bool padded = !batch->packed && random.chance(0.6), holes = random.chance(0.2);
    for (int64_t i = 0; i < n; ++i) {
      id += random.chance(steps) ? random.number(1, 3) : 0;
      const bool live =
          !padded || (i >= first / 2 && i < n - last / 2 && !(holes && random.chance(0.2)));
      batch->live.push_back(live);
      batch->visual.push_back(random.chance(visual));
      batch->segment.push_back(batch->packed || steps == 0 ? 0 : live ? id : random.number(-3, 3));
    }
  }
}

void build(Batch* b) {
  const size_t view = b->n_samples * b->length;
  b->view_live.resize(view);
  b->view_visual.resize(view);
  b->view_segment.resize(view);
  b->gather.resize(b->packed ? view : 0);
  b->scatter.resize(b->packed ? b->n_tokens : 0);
  b->start.resize(b->n_samples);
  b->image_samples.resize(b->n_samples);
  b->samples.resize(5 * b->n_samples);
  b->counts.resize(2 * b->n_samples);
  b->codes.resize(b->n_tokens);
  b->entries.resize(b->n_tokens);
  b->bounds.resize(2 * b->n_tokens);
  const Tokens tokens = {b->n_samples,
                         b->length,
                         b->n_tokens,
                         b->visual.data(),
                         b->live.data(),
                         b->segment.data(),
                         b->packed ? b->starts.data() : nullptr};
  const LayoutTables tables = {b->view_live.data(),
                               b->view_visual.data(),
                               b->view_segment.data(),
                               b->packed ? b->gather.data() : nullptr,
                               b->packed ? b->scatter.data() : nullptr,
                               b->start.data(),
                               b->image_samples.data(),
                               b->samples.data(),
                               b->counts.data(),
                               b->codes.data(),
                               b->bounds.data(),
                               b->entries.data()};
  const LayoutFacts facts = build_layout(tokens, tables);
  require(facts.segments_ordered, "ordered segments were refused");
  b->slot_tiles.resize(b->n_samples * facts.n_slots);
  b->panels.resize(3 * b->n_samples * facts.n_slots);
  b->tiles.resize(3 * b->n_samples * facts.n_tiles);
  write_slots(facts, b->start.data(), b->n_samples, b->slot_tiles.data(), b->panels.data(),
              b->tiles.data());
  Axis& axis = b->axis;
  axis.n_samples = b->n_samples;
  axis.n_tokens = b->n_tokens;
  axis.n_slots = facts.n_slots;
  axis.n_tiles = facts.n_tiles;
  axis.map_rows = facts.map_rows;
  axis.length = b->packed ? 0 : b->length;
  axis.samples = b->samples.data();
  axis.codes = b->codes.data();
  axis.bounds = b->bounds.data();
  axis.tiles = b->tiles.data();
  axis.entries = b->entries.data();
  axis.counts = b->counts.data();
  axis.slot_tiles = b->slot_tiles.data();
  axis.panels = b->panels.data();
}

void check_visibility(const Batch& b) {
  for (int64_t s = 0; s < b.n_samples; ++s) {
    int64_t n_rows = 0, n_entries = 0;
    for (int64_t i = b.begin(s); i < b.begin(s) + b.size(s); ++i) {
      int64_t entries = 0;
      for (int64_t j = b.begin(s); j < b.begin(s) + b.size(s); ++j) {
        if (!b.visible(s, i, j) || !b.visual[b.token(s, j)]) continue;
        ++entries;
        const int slot = b.axis.slot_of(s, static_cast<int>(j / kTile));
        require(slot >= 0, "an entry without a slot");
        const int64_t* panel = b.axis.panel(s, slot);
        require(i >= panel[1] && i < panel[2], "an entry outside its panel");
        require(panel[0] + i >= 0 && panel[0] + i < b.axis.map_rows, "a panel outside the map");
      }
      require(entries == b.entries[b.token(s, i)], "entries of a row");
      n_rows += entries > 0;
      n_entries += entries;
    }
    require(n_rows == b.counts[2 * s] && n_entries == b.counts[2 * s + 1], "counts of a sample");
    for (int r = 0; r < b.axis.tiles_of(s); ++r) {
      const RowTile rows = row_tile_of(b.axis, s, b.axis.first_tile(s) + r);
      for (int k = 0; k < b.axis.tiles_of(s); ++k) {
        const int tile = b.axis.first_tile(s) + k;
        int n_seen = 0;
        for (int i = rows.begin; i < rows.end; ++i) {
          for (int j = std::max(tile * kTile, b.axis.begin(s));
               j < std::min((tile + 1) * kTile, b.axis.end(s)); ++j) {
            n_seen += b.visible(s, i, j);
          }
        }
        const Seen what = seen(b.axis, rows, tile);
        require(n_seen == 0 || what != Seen::none, "a visible tile is skipped");
        require(n_seen == (rows.end - rows.begin) * kTile || what != Seen::all,
                "a tile is not masked");
      }
    }
  }
}

// Tensors of one case: (tokens, heads, dim), NaN at padding.
struct Tensors {
  int64_t heads, kv_heads, dim;
  std::vector<float> q, k, v, d_out, lse, d_lse, target;
};

View view_of(const Batch& b, std::vector<float>& x, int64_t heads, int64_t dim) {
  return {x.data(), b.packed ? 0 : b.length * heads * dim, heads * dim, dim, DType::f32};
}

std::vector<float> normal(Random& random, const Batch& b, int64_t per_token) {
  std::vector<float> x(b.n_tokens * per_token);
  for (size_t i = 0; i < x.size(); ++i) x[i] = b.live[i / per_token] ? random.normal() : kNan;
  return x;
}

void require_numbers(const std::vector<float>& x, const char* what) {
  for (const float value : x) require(!std::isnan(value), what);
}

void check_out(const Batch& b, const Tensors& t, const std::vector<float>& out,
               const std::vector<float>& lse) {
  const double scale = 1 / std::sqrt(static_cast<double>(t.dim));
  for (int64_t s = 0; s < b.n_samples; ++s) {
    for (int64_t i = b.begin(s); i < b.begin(s) + b.size(s); ++i) {
      for (int64_t h = 0; h < t.heads; ++h) {
        const int64_t g = h / (t.heads / t.kv_heads);
        std::vector<double> want(t.dim);
        double total = 0;
        for (int64_t j = b.begin(s); j <= i; ++j) {
          if (!b.visible(s, i, j)) continue;
          double score = 0;
          for (int64_t c = 0; c < t.dim; ++c) {
            score += static_cast<double>(t.q[(b.token(s, i) * t.heads + h) * t.dim + c]) *
                     t.k[(b.token(s, j) * t.kv_heads + g) * t.dim + c];
          }
          const double weight = std::exp(score * scale);
          total += weight;
          for (int64_t c = 0; c < t.dim; ++c) {
            want[c] += weight * t.v[(b.token(s, j) * t.kv_heads + g) * t.dim + c];
          }
        }
        const float got_lse = lse[b.axis.row_base(s, h, t.heads) + i];
        require(total == 0 ? std::isinf(got_lse) : std::fabs(got_lse - std::log(total)) < 1e-4,
                "lse");
        for (int64_t c = 0; c < t.dim; ++c) {
          const double exact = total == 0 ? 0 : want[c] / total;
          const float got = out[(b.token(s, i) * t.heads + h) * t.dim + c];
          require(std::fabs(got - exact) < 1e-4, "out");
        }
      }
    }
  }
}

// All passes; what they wrote, one after the other.
std::vector<float> run(const Batch& b, Tensors& t, const Kernels& kernels, int objective,
                       int threads) {
  std::vector<float> written;
  const auto keep = [&](const std::vector<float>& x, const char* what) {
    require_numbers(x, what);
    written.insert(written.end(), x.begin(), x.end());
  };
  Problem p;
  p.axis = b.axis;
  p.heads = t.heads;
  p.kv_heads = t.kv_heads;
  p.dim = t.dim;
  p.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(t.dim)));
  p.threads = threads;
  p.q = view_of(b, t.q, t.heads, t.dim);
  p.k = view_of(b, t.k, t.kv_heads, t.dim);
  p.v = view_of(b, t.v, t.kv_heads, t.dim);
  std::vector<float> out(t.q.size(), kNan), lse(b.n_tokens * t.heads, kNan);
  std::vector<float> map(b.axis.map_rows * kTile, 0.0f), loss(b.n_samples, kNan);
  p.out = view_of(b, out, t.heads, t.dim);
  p.lse = lse.data();
  p.map = map.data();
  attention_forward(p, kernels);
  keep(out, "out");
  keep(lse, "lse");
  keep(map, "the map of the forward");
  if (threads == 1) check_out(b, t, out, lse);

  std::vector<float> same(map.size(), 0.0f);
  p.map = same.data();
  p.modular = true;
  map_forward(p, kernels);
  for (size_t i = 0; i < map.size(); ++i) {
    require(std::fabs(map[i] - same[i]) < 1e-5, "the two maps differ");
  }
  t.target.resize(map.size());
  for (size_t i = 0; i < map.size(); ++i) t.target[i] = map[i] * (1 + 0.5f * (i % 7));
  alignment(b.axis, static_cast<Objective>(objective), map.data(), t.target.data(), loss.data(),
            threads);
  keep(loss, "loss");
  keep(map, "G");

  std::vector<float> dq(t.q.size(), kNan), dk(t.k.size(), kNan), dv(t.v.size(), kNan);
  std::vector<float> delta(lse.size(), kNan), d_loss(b.n_samples, 0.5f);
  p.map = map.data();
  p.d_loss = d_loss.data();
  p.delta = delta.data();
  p.dq = view_of(b, dq, t.heads, t.dim);
  p.dk = view_of(b, dk, t.kv_heads, t.dim);
  attention_backward(p, kernels);
  keep(dq, "dq of the modular form");
  keep(dk, "dk of the modular form");
  keep(delta, "dlse of the modular form");
  std::vector<float> norm(lse.size(), kNan);
  p.modular = false;
  p.norm = norm.data();
  p.d_lse = t.d_lse.data();
  p.d_out = view_of(b, t.d_out, t.heads, t.dim);
  p.dv = view_of(b, dv, t.kv_heads, t.dim);
  dq.assign(dq.size(), kNan);
  dk.assign(dk.size(), kNan);
  attention_backward(p, kernels);
  keep(dq, "dq");
  keep(dk, "dk");
  keep(dv, "dv");
  return written;
}

void fuzz_one() {
  Random random{std::mt19937(seed)};
  Batch batch;
  draw(random, &batch);
  build(&batch);
  check_visibility(batch);
  Tensors t;
  t.kv_heads = random.number(1, 2);
  t.heads = t.kv_heads * random.number(1, 2);
  const int64_t dims[] = {1, 8, 20, 48, 64};
  t.dim = dims[random.number(0, 4)];
  t.q = normal(random, batch, t.heads * t.dim);
  t.k = normal(random, batch, t.kv_heads * t.dim);
  t.v = normal(random, batch, t.kv_heads * t.dim);
  t.d_out = normal(random, batch, t.heads * t.dim);
  t.d_lse.resize(batch.n_tokens * t.heads);
  for (int64_t s = 0; s < batch.n_samples; ++s) {
    for (int64_t h = 0; h < t.heads; ++h) {
      for (int64_t i = batch.begin(s); i < batch.begin(s) + batch.size(s); ++i) {
        const bool live = batch.live[batch.token(s, i)];
        t.d_lse[batch.axis.row_base(s, h, t.heads) + i] = live ? random.normal() : kNan;
      }
    }
  }
  std::vector<const Kernels*> sets = {&portable_kernels()};
#ifdef CDFAST_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    sets.push_back(&avx2_kernels());
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      sets.push_back(&avx512_kernels());
    }
  }
#endif
  const Kernels& kernels = *sets[seed % sets.size()];
  const int objective = random.number(0, 4);
  const std::vector<float> alone = run(batch, t, kernels, objective, 1);
  const std::vector<float> together = run(batch, t, kernels, objective, 3);
  require(alone.size() == together.size(), "sizes");
  for (size_t i = 0; i < alone.size(); ++i) {
    require(alone[i] == together[i], "the result depends on the number of threads");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int first = argc > 1 ? std::atoi(argv[1]) : 0, last = argc > 2 ? std::atoi(argv[2]) : 100;
  for (seed = first; seed < last; ++seed) fuzz_one();
  std::printf("%d layouts\n", last - first);
}
