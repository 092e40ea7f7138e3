// Flash attention backward on the CPU (FlashAttention-2, arXiv 2307.08691, algorithm 2), in the
// accumulate type for every dtype.
//
// A task is one (sequence, KV head). It walks the keys block by block; the gradients of a block's
// keys and values sum up over all row tiles that see it, those of the queries over the blocks:
// every sum has one order, whatever the number of threads.
#include <cmath>
#include <numbers>

#include "attention/cpu_forward.h"

namespace mor::MOR_ISA {
namespace {

template <typename T>
class BackwardTask {
  using Gemm = FmaGemm<T>;
  using Acc = accumulate_t<T>;
  using Vec = vec_t<Acc>;
  static constexpr int64_t kWidth = kLanes<Acc>;
  static constexpr int64_t kBlock = 128;  // keys
  static constexpr int64_t kTile = 8 * Gemm::Micro::kRows;
  static_assert(kBlock % Gemm::kPanel == 0);

 public:
  BackwardTask(const AttentionBwdParams& bwd, int64_t b, int64_t kv_head)
      : bwd_(bwd),
        p_(bwd.forward),
        kv_head_(kv_head),
        seq_(p_, b, kv_head),
        padded_(round_up(p_.head_dim, Gemm::kColumnMultiple)) {
    thread_local Scratch scratch;
    const int64_t of_block = kBlock * padded_, of_tile = kTile * padded_;
    scratch.reset(Scratch::bytes_for<Acc>(of_block) * 5 + Scratch::bytes_for<Acc>(of_tile) * 2 +
                  Scratch::bytes_for<Acc>(kTile * kBlock) * 2 +
                  Scratch::bytes_for<Acc>(seq_.rows() * padded_) +
                  Scratch::bytes_for<Acc>(seq_.rows()) * 2);
    key_columns_ = scratch.take<Acc>(of_block);
    value_columns_ = scratch.take<Acc>(of_block);
    key_depth_ = scratch.take<Acc>(of_block);
    grad_key_ = scratch.take<Acc>(of_block);
    grad_value_ = scratch.take<Acc>(of_block);
    query_ = scratch.take<Acc>(of_tile);
    grad_out_ = scratch.take<Acc>(of_tile);
    weights_ = scratch.take<Acc>(kTile * kBlock);
    grad_scores_ = scratch.take<Acc>(kTile * kBlock);
    grad_query_ = scratch.take<Acc>(seq_.rows() * padded_);
    lse_ = scratch.take<Acc>(seq_.rows());
    delta_ = scratch.take<Acc>(seq_.rows());
  }

  void run() {
    std::fill_n(grad_query_, seq_.rows() * padded_, Acc{0});
    for (int64_t r = 0; r < seq_.rows(); ++r) {
      prepare_row(r);
    }
    for (int64_t key0 = 0; key0 < seq_.keys(); key0 += kBlock) {
      block(key0, std::min(kBlock, seq_.keys() - key0));
    }
    for (int64_t r = 0; r < seq_.rows(); ++r) {
      write(bwd_.grad_query, seq_.token_major(r), grad_query_ + r * padded_, p_.softmax_scale);
    }
  }

 private:
  // lse, but +inf where the row saw nothing, so that its weights are 0; delta = sum(grad_out * out)
  // - grad_lse, what the softmax takes off every score's gradient.
  void prepare_row(int64_t r) {
    const Acc lse = static_cast<const Acc*>(p_.lse)[seq_.head_major(r)];
    lse_[r] = lse == -std::numeric_limits<Acc>::infinity() ? -lse : lse;
    const T* out = static_cast<const T*>(p_.out) + seq_.token_major(r) * p_.head_dim;
    const T* grad_out = seq_.at(bwd_.grad_out, r);
    Vec total{};
    for_each_vector<Acc>(p_.head_dim, [&](int64_t d, auto lanes) {
      total += load_lanes(out + d, lanes) * load_lanes(grad_out + d, lanes);
    });
    const auto* grad_lse = static_cast<const Acc*>(bwd_.grad_lse);
    delta_[r] = sum_lanes<Acc>(total) - (grad_lse ? grad_lse[seq_.head_major(r)] : Acc{0});
  }

  void block(int64_t key0, int64_t keys) {
    std::fill_n(grad_key_, keys * padded_, Acc{0});
    std::fill_n(grad_value_, keys * padded_, Acc{0});
    const int64_t first_row = seq_.first_row_beyond(key0);
    if (first_row < seq_.rows()) {
      const auto key = [&](int64_t j) { return seq_.key(key0 + j); };
      const auto value = [&](int64_t j) { return seq_.value(key0 + j); };
      const int64_t d = p_.head_dim;
      const Operands operands{Gemm::pack_columns(key, keys, d, padded_, key_columns_),
                              Gemm::pack_columns(value, keys, d, padded_, value_columns_),
                              Gemm::pack_depth(key, keys, d, padded_, key_depth_)};
      for (int64_t r = first_row; r < seq_.rows(); r += kTile) {
        tile(r, std::min(kTile, seq_.rows() - r), key0, keys, operands);
      }
    }
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t row = (seq_.first_key() + key0 + j) * p_.kv_heads + kv_head_;
      write(bwd_.grad_key, row, grad_key_ + j * padded_, p_.softmax_scale);
      write(bwd_.grad_value, row, grad_value_ + j * padded_, 1);
    }
  }

  struct Operands {
    Panels<Acc> key_columns, value_columns, key_depth;
  };

  void tile(int64_t r0, int64_t rows, int64_t key0, int64_t keys, const Operands& operands) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = r * padded_;
      Gemm::pack_row(seq_.query(r0 + r), p_.head_dim, padded_, Acc{1}, query_ + at);
      Gemm::pack_row(seq_.at(bwd_.grad_out, r0 + r), p_.head_dim, padded_, Acc{1}, grad_out_ + at);
    }
    keys = std::min(keys, seq_.limit(r0 + rows - 1) - key0);
    const int64_t columns = round_up(keys, Gemm::kColumnMultiple);
    const Rows<Acc> query{query_, padded_}, grad_out{grad_out_, padded_};
    Gemm::template multiply<false>(rows, columns, p_.head_dim, query, operands.key_columns,
                                   weights_, kBlock);
    multiply_in_short_sums(rows, columns, grad_out, operands.value_columns, grad_scores_);
    for (int64_t r = 0; r < rows; ++r) {
      softmax_row(r0 + r, columns, weights_ + r * kBlock, grad_scores_ + r * kBlock);
    }
    if (columns > keys || seq_.limit(r0) < key0 + keys) {
      mask_scores(seq_, r0, rows, key0, columns, Acc{0}, weights_, kBlock);
      mask_scores(seq_, r0, rows, key0, columns, Acc{0}, grad_scores_, kBlock);
    }
    // Transposed on the left: element (key, row) of the weights is weights_[row * kBlock + key].
    Gemm::template multiply<true>(keys, padded_, rows, {weights_, 1, kBlock},
                                  {grad_out_, padded_, Gemm::kPanel}, grad_value_, padded_);
    Gemm::template multiply<true>(keys, padded_, rows, {grad_scores_, 1, kBlock},
                                  {query_, padded_, Gemm::kPanel}, grad_key_, padded_);
    Gemm::template multiply<true>(rows, padded_, keys, {grad_scores_, kBlock}, operands.key_depth,
                                  grad_query_ + r0 * padded_, padded_);
  }

  // Where a row sees few keys, delta takes off most of the result, which leaves the rounding errors
  // of both. They are smaller in sums of few terms.
  void multiply_in_short_sums(int64_t rows, int64_t columns, Rows<Acc> a, Panels<Acc> b, Acc* c) {
    constexpr int64_t kTerms = 32;
    std::fill_n(c, rows * kBlock, Acc{0});
    for (int64_t k = 0; k < p_.head_dim; k += kTerms) {
      const Panels<Acc> part{b.data + k * b.row_stride, b.row_stride, b.panel_stride};
      Gemm::template multiply<true>(rows, columns, std::min(kTerms, p_.head_dim - k),
                                    {a.data + k, a.row_stride}, part, c, kBlock);
    }
  }

  // scores -> weights exp(scale * score - lse); grad_weights -> weights * (grad_weights - delta),
  // the gradient of the scaled scores.
  void softmax_row(int64_t row, int64_t columns, Acc* weights, Acc* grad) {
    const Acc scale = static_cast<Acc>(p_.softmax_scale);
    for (int64_t j = 0; j < columns; j += kWidth) {
      const Vec log_weight = load<Acc>(weights + j) * scale - lse_[row];
      const Vec weight = exp2_nonpositive<Acc>(log_weight * std::numbers::log2e_v<Acc>);
      store<Acc>(weights + j, weight);
      store<Acc>(grad + j, weight * (load<Acc>(grad + j) - delta_[row]));
    }
  }

  void write(void* tensor, int64_t row, const Acc* from, double factor) const {
    T* to = static_cast<T*>(tensor) + row * p_.head_dim;
    for_each_vector<Acc>(p_.head_dim, [&](int64_t d, auto lanes) {
      store_lanes(to + d, load<Acc>(from + d) * static_cast<Acc>(factor), lanes);
    });
  }

  const AttentionBwdParams& bwd_;
  const AttentionParams& p_;
  const int64_t kv_head_;
  const Sequence<T> seq_;
  const int64_t padded_;
  Acc *key_columns_, *value_columns_, *key_depth_, *grad_key_, *grad_value_;
  Acc *query_, *grad_out_, *weights_, *grad_scores_, *grad_query_, *lse_, *delta_;
};

}  // namespace

void attention_bwd(const AttentionBwdParams& p) {
  const int64_t tasks = p.forward.batch * p.forward.kv_heads;
  dispatch_dtype(p.forward.dtype, [&]<typename T>() {
    parallel_tasks(tasks, [&](int64_t task, int64_t) {
      BackwardTask<T>(p, task / p.forward.kv_heads, task % p.forward.kv_heads).run();
    });
  });
}

}  // namespace mor::MOR_ISA
