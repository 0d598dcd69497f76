// Keeps the largest positive pre-activations: the k of each row, or the k a row of the whole batch, by (pre-activation
// descending, row, feature).  A NaN counts as the largest.  A floor below which nothing can be chosen, since k are above it,
// rises from tile to tile; what a screened tile bounds below the floor is never looked at again (docs/screen.md).
#pragma once
#include <algorithm>
#include <cstdint>
#include <functional>

#include "keys.hpp"
#include "tiles.hpp"

namespace sae_fast {

class Largest : public Tiles {  // of layers without a cut
 public:
  // `whole`: k * rows of the batch, not k of each row.  `room`: entries a row that may gather before a floor is sought.
  // `lift`: bfloat16 steps by which the floor is raised, 0 but in tests.
  Largest(const Kernels& kernels, int64_t rows, int64_t k, bool whole, int64_t room, int lift)
      : Tiles(kernels), k_(k), budget_(whole ? k * rows : k), whole_(whole), room_a_row_(room), lift_(lift), rows_(rows) {}

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
      for (int64_t r = 0; r < n; ++r) {
        const uint32_t floor = floor_of(b + r);
        found[r + 1] = found[r] + kernels_.screen({.ub = a.tile + (b + r) * a.width, .n = a.width, .above = above(floor),
                                                   .first = a.first, .indices = s.indices.data() + found[r]});
        if (floor > 0) against_a_floor += found[r + 1] - found[r];
      }
      if (against_a_floor > a.dense_above * static_cast<double>(n * a.width)) return take_dots(a, s, b, n);
      for (int64_t r = 0; r < n; ++r) {
        auto& waiting = row(b + r).waiting;
        const size_t before = waiting.size();
        waiting.resize(before + (found[r + 1] - found[r]));
        Waiting* to = waiting.data() + before;
        for (int64_t j = found[r]; j < found[r + 1]; ++j) {
          const int16_t bound = static_cast<int16_t>(a.tile[(b + r) * a.width + s.indices[j] - a.first]);
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
        s.cut.assign(a.width, keys::below(floor_of(b + r)) - margin);
        const int64_t found = kernels_.compact({.pre = a.tile + (b + r) * a.width, .bias = a.bias, .cut = s.cut.data(),
                                                .n = a.width, .first = 0, .indices = s.indices.data(), .u = s.u.data()});
        auto& waiting = row(b + r).waiting;
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
      for (int64_t r = 0; r < n; ++r) {
        const uint16_t* tile = a.tile + (b + r) * a.width;
        const int64_t found = kernels_.screen({.ub = tile, .n = a.width, .above = above(floor_of(b + r)), .first = a.first,
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

  int64_t candidates() const override { return verified_; }

 private:
  static constexpr int64_t kRun = 1024;  // features whose rows of W stay in cache
  static constexpr int64_t kARow = 4;    // dots of a row of x that make up for reading it
  static constexpr int64_t kFewOf = 64;  // rows a block, one of which is dotted sooner than all are screened again
  struct Waiting {  // passed the screen, not yet decided
    int32_t index;
    int16_t bound;  // bfloat16, positive
  };
  struct Entry {
    uint32_t key;  // the bits of a positive pre-activation, which ascend with it, or keys::kNaN
    int32_t index;
    float u;
  };
  struct Row {
    std::vector<Waiting> waiting;  // ascending
    std::vector<Entry> kept;
    uint32_t floor = 0;  // k are known to have at least this key, or thought to; 0 while that is not known of so many
    uint32_t guess = 0;  // the floor that was thought to be one
  };
  struct Scratch {  // a worker's
    std::vector<int32_t> indices;
    std::vector<int16_t> bounds;
    std::vector<int32_t> keys;
    std::vector<float> u, cut, block;
    int64_t verified = 0;
  };

  static bool before(const Entry& a, const Entry& b) { return a.key != b.key ? a.key > b.key : a.index < b.index; }

  Row& row(int64_t b) { return rows_[first_ + b]; }
  uint32_t floor_of(int64_t b) { return whole_ ? floor_ : row(b).floor; }

  // The largest bfloat16 that is no bound of anything at the floor or above: pi >= c makes u + bias, before its rounding, more
  // than the float before c, hence the bound, rounded to bfloat16, at least that float truncated.
  int16_t above(uint32_t floor) const {
    if (floor == 0) return 0;
    const int64_t least = static_cast<int64_t>((floor - 1) >> 16) + lift_;
    return static_cast<int16_t>(std::min<int64_t>(std::max<int64_t>(least, 1), keys::kInfinity >> 16) - 1);
  }

  void keep(int64_t b, int32_t index, float u, float pi) {
    const uint32_t key = keys::key_of(pi);
    if (key >= floor_of(b)) row(b).kept.push_back({key, index, u});
  }

  // How much the bounds of a row can be above what they bound, from now on.
  void expect(int64_t b, float excess) {
    if (!(excess <= excess_[b])) excess_[b] = excess;  // a NaN stays: nothing is known
  }

  template <class Tile>
  void take_exact(const Tile& a, Scratch& s, const float* u, int64_t b, int64_t n) {
    s.indices.resize(a.width + kSlack);
    s.u.resize(a.width + kSlack);
    for (int64_t r = 0; r < n; ++r) {
      s.cut.assign(a.width, keys::below(floor_of(b + r)));
      const int64_t found = kernels_.compact({.pre = u + r * a.width, .bias = a.layer.bias + a.first, .cut = s.cut.data(),
                                              .n = a.width, .first = a.first, .indices = s.indices.data(), .u = s.u.data()});
      for (int64_t j = 0; j < found; ++j) keep(b + r, s.indices[j], s.u[j], s.u[j] + a.layer.bias[s.indices[j]]);
    }
  }

  template <class Tile>
  void take_dots(const Tile& a, Scratch& s, int64_t b, int64_t n) {
    s.block.resize(n * a.width);
    dots(a.layer, b, n, a.width, a.first, s.block.data());
    take_exact(a, s, s.block.data(), b, n);
  }

  template <class Tile>
  void added(const Tile& a) {
    seen_ = a.first + a.width;
    if (held() <= room_) return;
    narrow(a.layer, false, a.threads);
    room_ = std::max(room_, 2 * held());
  }

  int64_t held() {
    int64_t sum = 0;
    for (int64_t b = 0; b < n_; ++b) sum += row(b).waiting.size() + row(b).kept.size();
    return sum;
  }

  int64_t all_kept() const {
    int64_t sum = 0;
    for (const Row& r : rows_) sum += static_cast<int64_t>(r.kept.size());
    return sum;
  }

  // Drops what cannot be chosen, by the bounds alone if that is enough; otherwise the entries with the largest bounds are
  // decided, which raises the floor to where it belongs, then what is left.
  void narrow(const Layer& layer, bool all, int threads) {
    std::vector<int16_t> least(n_, 1);
    if (whole_) rank_all(least);
    else each_block(threads, [&](Scratch& s, int64_t b, int64_t n) {
      for (int64_t r = b; r < b + n; ++r) rank(s, r, least[r]);
    });
    int64_t left = drop(threads);
    if (left == 0) return raise_floors(threads);  // exact tiles
    if (!all && 2 * held() < room_) return;
    decide(layer, least, std::min(left, k_ * n_), threads);
    raise_floors(threads);
    left = drop(threads);
    if (left == 0 || (!all && 2 * held() < room_)) return;
    decide(layer, std::vector<int16_t>(n_, 1), left, threads);
    raise_floors(threads);
  }

  // Ranks the bounds of a row: what the k best reach is, less the excess, a floor; `least` is where it is likely to be.
  void rank(Scratch& s, int64_t b, int16_t& least) {
    const auto& waiting = row(b).waiting;
    s.bounds.clear();
    for (const Waiting& w : waiting)
      if (w.bound < keys::kNoBound) s.bounds.push_back(w.bound);
    const int64_t n = static_cast<int64_t>(s.bounds.size());
    if (n == 0) return;
    const int64_t best = std::min(k_, row(b).kept.empty() ? n : (n + 1) / 2);
    const int16_t reached = keys::reached(s.bounds, best);
    if (best == k_) row(b).floor = std::max(row(b).floor, keys::at_least(reached, excess_[b]));
    least = keys::about(reached, excess_[b]);
  }

  void rank_all(std::vector<int16_t>& least) {
    std::vector<int64_t> bounds(keys::kNoBound), floors(keys::kNoBound);  // how many there are of each
    int64_t total = 0;
    for (int64_t b = 0; b < n_; ++b)
      for (const Waiting& w : row(b).waiting)
        if (w.bound < keys::kNoBound) ++bounds[w.bound], ++floors[keys::at_least(w.bound, excess_[b]) >> 16], ++total;
    const int64_t best = keys::reached_of(bounds, std::min(budget_, all_kept() == 0 ? total : (total + 1) / 2));
    for (int64_t b = 0; b < n_; ++b) least[b] = keys::about(static_cast<int16_t>(best), excess_[b]);
    floor_ = std::max(floor_, static_cast<uint32_t>(keys::reached_of(floors, budget_)) << 16);
  }

  // What waits below its row's floor goes.  Returns how much is left.
  int64_t drop(int threads) {
    each_block(threads, [&](Scratch&, int64_t b, int64_t n) {
      for (int64_t r = b; r < b + n; ++r) {
        auto& list = row(r).waiting;
        const int16_t level = above(floor_of(r));
        list.erase(std::remove_if(list.begin(), list.end(), [&](const Waiting& w) { return w.bound <= level; }), list.end());
      }
    });
    int64_t left = 0;
    for (int64_t b = 0; b < n_; ++b) left += static_cast<int64_t>(row(b).waiting.size());
    return left;
  }

  // The dots of all that waits with a bound of at least its row's, about `number` in all, one run of features after the other:
  // together the rows read each row of W from memory once, but no run is so short that x is read for less than kARow.
  void decide(const Layer& layer, const std::vector<int16_t>& least, int64_t number, int threads) {
    const int64_t run = std::max(kRun, kARow * n_ * seen_ / number);
    std::vector<std::pair<size_t, size_t>> cursors(n_);  // read, written back
    for (int64_t last = std::min(run, seen_); n_ > 0; last = std::min(last + run, seen_)) {
      each_block(threads, [&](Scratch& s, int64_t b, int64_t n) {
        for (int64_t r = b; r < b + n; ++r) {
          auto& list = row(r).waiting;
          auto& [read, written] = cursors[r];
          s.indices.clear();
          for (; read < list.size() && list[read].index < last; ++read) {
            if (list[read].bound >= least[r]) s.indices.push_back(list[read].index);
            else list[written++] = list[read];
          }
          if (last == seen_) list.resize(written);
          const int64_t found = static_cast<int64_t>(s.indices.size());
          s.u.resize(std::max<size_t>(s.u.size(), found));
          const int64_t members = kernels_.verify({.x = layer.x + r * layer.d, .W = layer.W, .d = layer.d, .bias = layer.bias,
                                                   .cut = nullptr, .candidates = s.indices.data(), .n = found,
                                                   .indices = s.indices.data(), .u = s.u.data()});
          for (int64_t j = 0; j < members; ++j) keep(r, s.indices[j], s.u[j], s.u[j] + layer.bias[s.indices[j]]);
          s.verified += found;
        }
      });
      if (last == seen_) break;
    }
  }

  // Leaves the best; the last of them is the floor.
  void raise_floors(int threads) {
    if (whole_) return raise_the_floor();
    each_block(threads, [&](Scratch& s, int64_t b, int64_t n) {
      for (int64_t r = b; r < b + n; ++r) {
        auto& kept = row(r).kept;
        if (static_cast<int64_t>(kept.size()) < k_) continue;
        s.keys.clear();
        for (const Entry& e : kept) s.keys.push_back(static_cast<int32_t>(e.key));
        const uint32_t floor = static_cast<uint32_t>(keys::reached(s.keys, k_));
        kept.erase(std::remove_if(kept.begin(), kept.end(), [&](const Entry& e) { return e.key < floor; }), kept.end());
        if (static_cast<int64_t>(kept.size()) > k_) {
          std::nth_element(kept.begin(), kept.begin() + k_ - 1, kept.end(), before);
          kept.resize(k_);
        }
        row(r).floor = std::max(row(r).floor, floor);
      }
    });
  }

  void raise_the_floor() {
    std::vector<uint32_t> keys;
    for (const Row& r : rows_)
      for (const Entry& e : r.kept) keys.push_back(e.key);
    if (static_cast<int64_t>(keys.size()) < budget_ || keys.empty()) return;
    std::nth_element(keys.begin(), keys.begin() + budget_ - 1, keys.end(), std::greater<uint32_t>());
    floor_ = std::max(floor_, keys[budget_ - 1]);
    for (Row& r : rows_)
      r.kept.erase(std::remove_if(r.kept.begin(), r.kept.end(), [&](const Entry& e) { return e.key < floor_; }), r.kept.end());
  }

  // The last so many of those at the floor itself go.
  void leave_out(int64_t excess) {
    const auto at_floor = [&](const Entry& e) { return e.key == floor_; };
    for (auto r = rows_.rbegin(); r != rows_.rend() && excess > 0; ++r) {
      auto& kept = r->kept;
      int64_t stay = std::count_if(kept.begin(), kept.end(), at_floor);
      const int64_t gone = std::min(stay, excess);
      stay -= gone, excess -= gone;
      const auto goes = [&](const Entry& e) { return at_floor(e) && stay-- <= 0; };
      if (gone > 0) kept.erase(std::remove_if(kept.begin(), kept.end(), goes), kept.end());
    }
  }

  // body(scratch, b, n) for each run b .. b + n of the block's rows; what is written belongs to those rows.
  template <class Body>
  void each_block(int threads, const Body& body) {
    std::vector<Scratch> scratch(std::max(threads, 1));
    for_each((n_ + kBlock - 1) / kBlock, threads, [&](int64_t i, int worker) {
      body(scratch[worker], i * kBlock, std::min(kBlock, n_ - i * kBlock));
    });
    for (const Scratch& s : scratch) verified_ += s.verified;
  }

  int64_t k_, budget_;
  bool whole_;
  int64_t room_a_row_;
  int lift_;
  std::vector<Row> rows_;
  int64_t first_ = 0, n_ = 0, seen_ = 0, room_ = 0, verified_ = 0;
  std::vector<float> excess_;  // of the bounds of each row of the block
  uint32_t floor_ = 0, guessed_ = 0;  // of the whole batch
};

}  // namespace sae_fast
