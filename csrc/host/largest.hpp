// Keeps the largest positive pre-activations: the k of each row, or the `budget` of the whole batch, by (pre-activation
// descending, row, feature); or the largest in magnitude, of either sign.  A NaN counts as the largest.
#pragma once
#include "floors.hpp"

namespace sae_fast {

class Largest : public Floors {  // of layers without a cut
 public:
  // `budget`: as many of the whole batch, about k a row; negative for k of each row.  `signs`: in magnitude, of either sign.
  // `room`: entries a row that may gather before a floor is sought.  `lift`: bfloat16 steps by which the floor is raised, 0
  // but in tests.
  Largest(const Kernels& kernels, int64_t rows, int64_t k, int64_t budget, bool signs, int64_t room, int lift)
      : Floors(kernels, rows, k, budget, signs, room, lift) {}

  // The tiles that follow are of the rows first .. first + n.  guess [n], or null: what the last that is chosen of a row (of
  // the whole batch: the least guess) is thought to reach.  It is the first floor; if it was too high, that is noticed.
  void begin(int64_t first, int64_t n, const float* guess) {
    first_ = first, n_ = n, seen_ = 0, excess_.assign(n, 0.0f);
    room_ = n * room_a_row_;
    for (int64_t b = 0; b < n; ++b) {
      row(b).kept.clear();
      row(b).kept.reserve(2 * k_);
      row(b).floor = row(b).guess = guess && !whole_ && guess[b] > 0 ? host::bits(guess[b]) : 0;
    }
    const float least = guess && whole_ && n > 0 ? *std::min_element(guess, guess + n) : 0.0f;
    if (least > 0) floor_ = std::max(floor_, guessed_ = host::bits(least));
  }

  void add_tile(const args::add_tile& a) override {
    each_block(a.threads, [&](Scratch& s, int64_t b, int64_t n) { take_exact(a, s, a.tile + b * a.width, b, n); });
    added(a);
  }

  void add_dense(const args::add_dense& a) override {
    each_block(a.threads, [&](Scratch& s, int64_t b, int64_t n) { take_dots(a, s, b, n); });
    added(a);
  }

  // What passes the floor waits for the dots; dense_above counts only rows whose floor stands.
  void add_screened_tile(const args::add_screened_tile& a) override {
    for (int64_t b = 0; b < n_; ++b) expect(b, a.excess[b]);
    each_block(a.threads, [&](Scratch& s, int64_t b, int64_t n) {
      s.indices.resize(n * a.width);
      int64_t found[kBlock + 1] = {0}, against_a_floor = 0;
      s.tile.resize(signs_ ? n * a.width : 0);
      for (int64_t r = 0; r < n; ++r) {
        const uint32_t floor = floor_of(b + r);
        const uint16_t* tile = a.tile + (b + r) * a.width;
        if (signs_) tile = keys::of_magnitudes(tile, a.width, a.excess[b + r], s.tile.data() + r * a.width);
        found[r + 1] = found[r] + kernels_.screen({.ub = tile, .n = a.width, .above = above(floor), .first = a.first,
                                                   .indices = s.indices.data() + found[r]});
        if (floor > 0) against_a_floor += found[r + 1] - found[r];
      }
      if (against_a_floor > a.dense_above * static_cast<double>(n * a.width)) return take_dots(a, s, b, n);
      for (int64_t r = 0; r < n; ++r) {
        const uint16_t* tile = signs_ ? s.tile.data() + r * a.width : a.tile + (b + r) * a.width;
        auto& waiting = row(b + r).waiting;
        const size_t before = waiting.size();
        waiting.resize(before + (found[r + 1] - found[r]));
        Waiting* to = waiting.data() + before;
        for (int64_t j = found[r]; j < found[r + 1]; ++j) {
          const int16_t bound = static_cast<int16_t>(tile[s.indices[j] - a.first]);
          *to++ = {s.indices[j], bound < 0 ? keys::kNaNBound : bound};  // a negative one that passed is a NaN
        }
      }
    });
    added(a);
  }

  // A bound is u, the bias and half of what the bounds can be above what they bound.
  void add_bounded_tile(const args::add_bounded_tile& a) override {
    for (int64_t b = 0; b < n_; ++b) expect(b, 2.0f * a.margins[b]);
    each_block(a.threads, [&](Scratch& s, int64_t b, int64_t n) {
      s.indices.resize(a.width + kSlack);
      s.u.resize(a.width + kSlack);
      for (int64_t r = 0; r < n; ++r) {
        const float margin = 0.5f * excess_[b + r];
        auto& waiting = row(b + r).waiting;
        const float* tile = a.tile + (b + r) * a.width;
        if (signs_) {
          for (int64_t i = 0; i < a.width; ++i) {
            const int16_t bound = keys::upward(std::fabs(tile[i] + a.bias[i]) + margin);
            if (bound > above(floor_of(b + r))) waiting.push_back({a.first + static_cast<int32_t>(i), bound});
          }
          continue;
        }
        s.cut.assign(a.width, keys::below(floor_of(b + r)) - margin);
        const int64_t found = kernels_.compact({.pre = tile, .bias = a.bias, .cut = s.cut.data(), .n = a.width, .first = 0,
                                                .indices = s.indices.data(), .u = s.u.data()});
        for (int64_t j = 0; j < found; ++j) {
          const int16_t bound = keys::upward(s.u[j] + a.bias[s.indices[j]] + margin);
          if (bound > above(floor_of(b + r))) waiting.push_back({a.first + s.indices[j], bound});
        }
      }
    });
    added(a);
  }

  void add_rounded_tile(const args::add_rounded_tile& a) override {
    each_block(a.threads, [&](Scratch& s, int64_t b, int64_t n) {
      s.indices.resize(a.width);
      s.tile.resize(signs_ ? a.width : 0);
      for (int64_t r = 0; r < n; ++r) {
        const uint16_t *tile = a.tile + (b + r) * a.width, *sizes = signs_ ? s.tile.data() : tile;
        if (signs_) std::transform(tile, tile + a.width, s.tile.data(), [](uint16_t value) { return value & 0x7fff; });
        const int64_t found = kernels_.screen({.ub = sizes, .n = a.width, .above = above(floor_of(b + r)), .first = a.first,
                                               .indices = s.indices.data()});
        for (int64_t j = 0; j < found; ++j) {
          const int32_t i = s.indices[j];
          const float pi = host::widen(tile[i - a.first]);
          keep(b + r, i, pi - a.layer.bias[i], pi);
        }
      }
    });
    added(a);
  }

  // After the last tile of a block of rows: what still waits is decided, and rows whose guess was too high are dotted.  False
  // if those are so many that the block had better begin again without a guess.
  bool settle(const Layer& layer, int threads) {
    narrow(layer, true, threads);
    std::vector<int64_t> again;
    for (int64_t b = 0; b < n_ && !whole_; ++b)
      if (row(b).guess > 0 && static_cast<int64_t>(row(b).kept.size()) < k_) again.push_back(b);
    if (static_cast<int64_t>(again.size()) > n_ / kFewOf + 1) return false;
    std::vector<Scratch> scratch(std::max(threads, 1));
    for_each(static_cast<int64_t>(again.size()), threads, [&](int64_t i, int worker) {
      row(again[i]).kept.clear();
      row(again[i]).floor = 0;
      for (int64_t first = 0; first < seen_; first += kRun) {
        const args::add_dense all{layer, std::min(kRun, seen_ - first), static_cast<int32_t>(first), 1};
        take_dots(all, scratch[worker], again[i], 1);
      }
    });
    if (!again.empty()) raise_floors(threads);
    for_each(n_, threads, [&](int64_t b, int) {
      std::vector<Waiting>().swap(row(b).waiting);
      if (row(b).kept.capacity() > 2 * row(b).kept.size()) row(b).kept.shrink_to_fit();
    });
    return true;
  }

  // After the last block: leaves exactly the chosen.  Returns their number; -1 if the guess for the whole batch was too high:
  // then all has to be done again without it.
  int64_t select(int threads) {
    if (whole_ && guessed_ > 0 && all_kept() < budget_) return -1;
    if (whole_ && all_kept() > budget_) raise_the_floor();
    host::parallel_for(static_cast<int64_t>(rows_.size()), kBlock, threads, [&](int64_t b, int) {
      const auto ascending = [](const Entry& a, const Entry& c) { return a.index < c.index; };
      auto& kept = rows_[b].kept;
      if (!std::is_sorted(kept.begin(), kept.end(), ascending)) std::sort(kept.begin(), kept.end(), ascending);
    });
    if (whole_) leave_out(all_kept() - budget_);
    return all_kept();
  }

  void finish(const args::finish& a) override {
    a.indptr[0] = 0;
    for (size_t b = 0; b < rows_.size(); ++b) a.indptr[b + 1] = a.indptr[b] + static_cast<int64_t>(rows_[b].kept.size());
    host::parallel_for(static_cast<int64_t>(rows_.size()), kBlock, a.threads, [&](int64_t b, int) {
      int64_t at = a.indptr[b];
      for (const Entry& e : rows_[b].kept) a.indices[at] = e.index, a.u[at++] = e.u;
    });
  }

 private:
  static constexpr int64_t kFewOf = 64;  // rows a block, one of which is dotted sooner than all are screened again

  template <class Tile>
  void take_exact(const Tile& a, Scratch& s, const float* u, int64_t b, int64_t n) {
    s.indices.resize(a.width + kSlack);
    s.u.resize(a.width + kSlack);
    for (int64_t r = 0; r < n; ++r) {
      s.cut.assign(a.width, keys::below(floor_of(b + r)));
      const int64_t found = kernels_.compact({.pre = u + r * a.width, .bias = a.layer.bias + a.first, .cut = s.cut.data(),
                                              .n = a.width, .first = a.first, .indices = s.indices.data(), .u = s.u.data()});
      for (int64_t j = 0; j < found; ++j) keep(b + r, s.indices[j], s.u[j], s.u[j] + a.layer.bias[s.indices[j]]);
      if (signs_) take_negative(a, s, u + r * a.width, b + r);
    }
  }

  // Of a row the entries with -(u + bias) above s.cut.
  template <class Tile>
  void take_negative(const Tile& a, Scratch& s, const float* u, int64_t b) {
    const float* bias = a.layer.bias + a.first;
    s.flipped.resize(2 * a.width);
    for (int64_t i = 0; i < a.width; ++i) s.flipped[i] = -u[i], s.flipped[a.width + i] = -bias[i];
    const int64_t found = kernels_.compact({.pre = s.flipped.data(), .bias = s.flipped.data() + a.width,
                                            .cut = s.cut.data(), .n = a.width, .first = 0, .indices = s.indices.data(),
                                            .u = s.u.data()});
    for (int64_t j = 0; j < found; ++j) {
      const int32_t i = s.indices[j];
      const float pi = u[i] + bias[i];
      if (pi == pi) keep(b, a.first + i, u[i], pi);  // a NaN is there already
    }
  }

  template <class Tile>
  void take_dots(const Tile& a, Scratch& s, int64_t b, int64_t n) {
    s.block.resize(n * a.width);
    dots(a.layer, b, n, a.width, a.first, s.block.data());
    take_exact(a, s, s.block.data(), b, n);
  }
};

}  // namespace sae_fast
