// out[m] = c * sigmoid(alpha * (c + cubic * c^3)) * (clamp(u, limit) + shift) for c = min(g, limit), g the first half of x[m]
// and its bias, and u the second; or out[m] = max(x[m], 0)^2
#include "slot_bias.cuh"

struct Args { Rows x, out; SlotBias bias; f32 alpha, cubic, limit, shift; u32 squared, padding; };

template <typename X, typename Y> __device__ void activate(const Args& args) {
    FOR_RUNS(args.out, m, n, count) {
        const X* x = row<X>(args.x, m) + n;
        Run gate = read(x, count), up = {};
        if (!args.squared) up = read(x + args.out.width, count);
        if (args.bias.bias) {
            const f32* bias = bias_of(args.bias, m);
            if (!bias) continue;
            for (u32 j = 0; j < count; ++j) {
                gate.values[j] += bias[n + j];
                if (!args.squared) up.values[j] += bias[args.out.width + n + j];
            }
        }
        for (u32 j = 0; j < RUN; ++j) {
            // Comparisons, so that a NaN stays one.
            if (args.squared) {
                const f32 x = gate.values[j] < 0.0f ? 0.0f : gate.values[j];
                gate.values[j] = x * x;
                continue;
            }
            const f32 g = gate.values[j] > args.limit ? args.limit : gate.values[j];
            const f32 u = up.values[j] > args.limit ? args.limit : up.values[j] < -args.limit ? -args.limit : up.values[j];
            gate.values[j] = g * sigmoid(args.alpha * (g + args.cubic * g * g * g)) * (u + args.shift);
        }
        write(row<Y>(args.out, m) + n, gate, count);
    }
}

KERNEL(activate, Args, f32, f32)
KERNEL(activate, Args, f32, bf16)
KERNEL(activate, Args, bf16, f32)
KERNEL(activate, Args, bf16, bf16)
