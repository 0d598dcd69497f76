// The floor below which no pre-activation can be among the largest, since as many are above it: it rises from tile to tile, and
// what is bounded below it is never looked at again (docs/screen.md).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>

#include "keys.hpp"
#include "tiles.hpp"

namespace sae_fast {

class Floors : public Tiles {
 public:
  int64_t candidates() const override { return verified_; }

 protected:
  Floors(const Kernels& kernels, int64_t rows, int64_t k, int64_t budget, bool signs, int64_t room, int lift)
      : Tiles(kernels), k_(k), budget_(budget < 0 ? k : budget), whole_(budget >= 0), signs_(signs), room_a_row_(room),
        lift_(lift), rows_(rows) {}

  static constexpr int64_t kRun = 1024;  // features whose rows of W stay in cache
  static constexpr int64_t kARow = 4;    // dots of a row of x that make up for reading it
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
    std::vector<float> u, cut, block, flipped;
    std::vector<uint16_t> tile;
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
    const uint32_t key = keys::key_of(signs_ ? std::fabs(pi) : pi);
    if (key > 0 && key >= floor_of(b)) row(b).kept.push_back({key, index, u});
  }

  // By how much a bound of a row can be above what it bounds; of magnitudes also by the two bfloat16 steps between which a
  // bound of pi was rounded.
  float excess_of(int64_t b, int16_t bound) const {
    return signs_ ? excess_[b] + 0x1.1p-6f * host::widen(static_cast<uint16_t>(bound)) + 0x1p-131f : excess_[b];
  }

  // How much the bounds of a row can be above what they bound, from now on.
  void expect(int64_t b, float excess) {
    if (!(excess <= excess_[b])) excess_[b] = excess;  // a NaN stays: nothing is known
  }

  template <class Tile>
  void added(const Tile& a) {
    seen_ = a.first + a.width;
    if (signs_) uncut_.resize(seen_, std::numeric_limits<float>::quiet_NaN());
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
    if (best == k_) row(b).floor = std::max(row(b).floor, keys::at_least(reached, excess_of(b, reached)));
    least = keys::about(reached, excess_[b]);
  }

  void rank_all(std::vector<int16_t>& least) {
    std::vector<int64_t> bounds(keys::kNoBound), floors(keys::kNoBound);  // how many there are of each
    int64_t total = 0;
    for (int64_t b = 0; b < n_; ++b)
      for (const Waiting& w : row(b).waiting)
        if (w.bound < keys::kNoBound) ++bounds[w.bound], ++floors[keys::at_least(w.bound, excess_of(b, w.bound)) >> 16], ++total;
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
                                                   .cut = signs_ ? uncut_.data() : nullptr, .candidates = s.indices.data(), .n = found,
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
  bool whole_, signs_;
  int64_t room_a_row_;
  int lift_;
  std::vector<Row> rows_;
  int64_t first_ = 0, n_ = 0, seen_ = 0, room_ = 0, verified_ = 0;
  std::vector<float> excess_;  // of the bounds of each row of the block
  std::vector<float> uncut_;   // a cut that every candidate passes
  uint32_t floor_ = 0, guessed_ = 0;  // of the whole batch
};

}  // namespace sae_fast
