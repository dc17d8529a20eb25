// Sub-trajectory balance over all pairs of states in O(L) on the CPU: the recursions of
// kernels/alphaspin_kernels/subtb_loss.py, in double, forwards and backwards over each row.
//
// Shape suffixes: B sequences, L tokens, S = L + 1 states.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;

// States of one task: a millisecond or two, since waking the threads of a busy machine costs that.
constexpr int64_t GRAIN = 1 << 16;

std::tuple<Tensor, Tensor, Tensor> subtb_loss_cpu(const Tensor& log_pf, const Tensor& log_pterm,
                                                  const Tensor& log_reward, const Tensor& lengths,
                                                  double lam, bool with_gradient) {
  // Shapes, dtypes and devices were checked in Python; memory safety does not rest on that alone.
  TORCH_CHECK_VALUE(log_pf.dim() == 2, "log_pf must be [B, L], got ", log_pf.sizes());
  const int64_t batch = log_pf.size(0), tokens = log_pf.size(1), states = tokens + 1;
  for (const Tensor& tensor : {log_pf, log_pterm, log_reward}) {
    TORCH_CHECK_VALUE(tensor.scalar_type() == at::kFloat, "log_pf, log_pterm and log_reward must be ",
                      "fp32, got ", tensor.scalar_type());
  }
  for (const Tensor& tensor : {log_pterm, log_reward}) {
    TORCH_CHECK_VALUE(
        tensor.dim() == 2 && tensor.size(0) == batch && tensor.size(1) == states,
        "log_pterm and log_reward must be [B, L + 1] with B = ", batch, " and L = ", tokens, ", got ",
        tensor.sizes());
  }
  TORCH_CHECK_VALUE(lengths.dim() == 1 && lengths.size(0) == batch &&
                        lengths.scalar_type() == at::kLong,
                    "lengths must be [B] int64 with B = ", batch, ", got ", lengths.sizes());

  const Tensor pf = log_pf.detach().contiguous(), pterm = log_pterm.detach().contiguous();
  const Tensor reward = log_reward.detach().contiguous(), lengths_contiguous = lengths.contiguous();
  const float* log_pf_BL = pf.const_data_ptr<float>();
  const float* log_pterm_BS = pterm.const_data_ptr<float>();
  const float* log_reward_BS = reward.const_data_ptr<float>();
  const int64_t* lengths_B = lengths_contiguous.const_data_ptr<int64_t>();
  int64_t longest = 0;
  for (int64_t b = 0; b < batch; ++b) {
    TORCH_CHECK_VALUE(lengths_B[b] >= 0 && lengths_B[b] <= tokens, "length ", lengths_B[b],
                      " is outside [0, L = ", tokens, "]");
    longest = std::max(longest, lengths_B[b]);
  }
  Tensor loss = at::zeros({}, pf.options());
  Tensor g = at::zeros({with_gradient ? batch : 0, states}, pf.options());
  Tensor d_log_pf = at::zeros({with_gradient ? batch : 0, tokens}, pf.options());
  if (longest == 0) return {loss, g, d_log_pf};
  float* g_BS = g.mutable_data_ptr<float>();
  float* d_log_pf_BL = d_log_pf.mutable_data_ptr<float>();

  // A_j and lam^-j (1 unless lam > 1) are the same for all rows.
  const double growth = std::min(lam, 1.0), fade = 1.0 / std::max(lam, 1.0);
  std::vector<double> a_S(longest + 1, 0.0), fade_S(longest + 1, 1.0), weight_S(longest + 1, 0.0);
  for (int64_t j = 1; j <= longest; ++j) {
    a_S[j] = growth * a_S[j - 1] + fade_S[j - 1];
    fade_S[j] = fade_S[j - 1] * fade;
  }
  for (int64_t j = 1; j <= longest; ++j) weight_S[j] = weight_S[j - 1] + a_S[j] * fade_S[longest - j];
  double weights = 0.0;
  for (int64_t b = 0; b < batch; ++b) weights += weight_S[lengths_B[b]];

  std::vector<double> sum_B(batch);
  at::parallel_for(0, batch, std::max<int64_t>(1, GRAIN / states), [&](int64_t begin, int64_t end) {
    std::vector<double> delta_S(longest + 1), ends_S(longest + 1, 0.0);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t length = lengths_B[b];
      const float* log_pf_L = log_pf_BL + b * tokens;
      const float* log_pterm_S = log_pterm_BS + b * states;
      const float* log_reward_S = log_reward_BS + b * states;
      double m = 0.0, q = 0.0, sum = 0.0;
      for (int64_t j = 1; j <= length; ++j) {
        const double delta = (static_cast<double>(log_reward_S[j]) - log_reward_S[j - 1]) -
                             (static_cast<double>(log_pterm_S[j]) - log_pterm_S[j - 1]) -
                             log_pf_L[j - 1];
        q = growth * (q - 2.0 * delta * m) + a_S[j] * delta * delta;
        m = growth * m - a_S[j] * delta;
        sum += q * fade_S[longest - j];
        delta_S[j] = delta;
        ends_S[j] = m * fade_S[longest - j];
      }
      sum_B[b] = sum;
      if (!with_gradient) continue;

      double starts = 0.0, later = 0.0;  // later: sum of g_i over i >= j
      m = 0.0;
      for (int64_t j = length; j >= 1; --j) {
        const double g_j = -2.0 * (ends_S[j] + starts) / weights;
        later += g_j;
        g_BS[b * states + j] = static_cast<float>(g_j);
        d_log_pf_BL[b * tokens + j - 1] = static_cast<float>(-later);
        const int64_t step = length + 1 - j;
        m = growth * m + a_S[step] * delta_S[j];
        starts = m * fade_S[longest - step];
      }
      g_BS[b * states] = static_cast<float>(-2.0 * starts / weights);
    }
  });
  double sum = 0.0;
  for (const double part : sum_B) sum += part;
  loss.fill_(sum / weights);
  return {loss, g, d_log_pf};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(alphaspin, m) {
  m.def(
      "subtb_loss_cpu(Tensor log_pf, Tensor log_pterm, Tensor log_reward, Tensor lengths, float lam, "
      "bool with_gradient) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(alphaspin, CPU, m) { m.impl("subtb_loss_cpu", &subtb_loss_cpu); }
