/* The CPU kernels, one translation unit, which kernels_cpu.py compiles for the machine that runs it.

   Letters: M rows of an activation, K columns, N output features; B sequences, H heads, S queries, T keys, D numbers a
   head. */
#include "common.h"
#include "instructions.h"
#include "activations.h"
#include "threads.h"
#include "linear.h"
#include "half_linear.h"
#include "attention.h"
#include "rotary.h"
#include "gelu.h"
