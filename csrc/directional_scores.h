// Scores of the samples of one layer along full-rank directions, or their sums of squares.
//
//   score_pn = sum_t g_nt^T U_p a_nt        a (n, t, i), g (n, t, o), U (p, o, i)
//
// directional_scores writes them, directional_curvature only their mean squares: they come out of
// registers sample by sample, and an array of them is written only where it is the result.
//
// Bounds. Two exact forms differ in work:
//   factorised   q_ntp = g_nt . (U_p a_nt), summed over t     2 n t p o i      FLOP
//   contracted   M_n = sum_t g_nt a_nt^T, then <M_n, U_p>     2 n o i (t + p)  FLOP
// so tokens are contracted first once both t and p exceed one or two. Bytes that must move are
// the inputs once: b (n t (i + o) + p o i), b bytes an element. The intensity of the factorised
// form without tokens is therefore about 2n/b FLOP per byte where U dominates: bound by memory
// bandwidth below some tens of samples, by arithmetic above.
//
// Neither form writes an array of n p o elements. Without tokens the product g^T U_p lives in a
// register tile and is multiplied by a there; with tokens tiles of M_n live in the level-two cache
// and are used for every direction. Scratch: packed copies of the inputs of one pass, at most
// 32 MiB or one sample block (of up to 2048 tokens) if that is larger, partial sums of about the
// same size, and about half a MiB a thread.
//
// The result depends on shapes, values and instruction set, never on the number of threads:
// arithmetic is cut into units by shape, each unit writes its own slot, slots are added in a
// fixed order in fp64.
#pragma once

#include <cstdint>

#include "array.h"
#include "isa.h"

namespace ddf {

struct DirectionalScores {
  Array a, g, U;                 // contiguous; any mix of types
  double* squares = nullptr;     // (p,), sums of squared scores over n; or, where it is null,
  void* out = nullptr;           // (p, n) scores, of the type of the arithmetic. Written whole
  int64_t n = 0, t = 1, i = 0, o = 0, p = 0;
  int threads = 1;
};

// Arithmetic is fp64 if any input is, else fp32 with fp64 sums over tiles, tokens and samples.
// A sum over no samples, tokens, inputs or outputs is 0.
DDF_DECLARE(directional_scores, DirectionalScores)

}  // namespace ddf
