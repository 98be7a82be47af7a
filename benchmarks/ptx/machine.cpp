// A GPU's threads on a CPU: runs programs of a kernel, decoded from PTX by __init__.py, one warp at a time.
//
// A warp goes on until a barrier or its end; then the next one, in an order that a seed decides, as it does which lane
// is the last to write where several write to one place. A kernel whose result depends on the seed lacks a barrier.
// What is asynchronous happens as late as it may. Errors: addresses outside of the tensors, or misaligned; shared
// memory that is read but was not written; programs that touch what another one writes; branches and barriers that
// the lanes of a warp do not take together. Tensor cores sum up exactly and round once an instruction.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

using namespace std;
typedef uint64_t u64;
typedef uint32_t u32;
typedef uint16_t u16;
typedef int64_t i64;
typedef int32_t i32;
typedef int16_t i16;

static constexpr int LANES = 32;
static constexpr u32 ALL = 0xffffffffu;

// Numbers

static float number(u64 x) { u32 y = u32(x); float f; memcpy(&f, &y, 4); return f; }
static u64 bits(float f) { u32 y; memcpy(&y, &f, 4); return y; }
static float brain(u64 x) { return number(u64(u16(x)) << 16); }
static float half(u64 x) { return _cvtsh_ss(u16(x)); }
static float tf32(u64 x) { return number(u32(x) & 0xffffe000u); }
static u32 to_half(float f) { return u16(_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT)); }
static u32 to_tf32(u32 x) { return (x >> 23 & 255) == 255 ? x : (x + 0x1000) & 0xffffe000u; }

static u32 to_brain(double x) {
    float f = float(x);
    if (f != f) return 0x7fff;
    u32 y = u32(bits(f));
    if (double(f) != x && !isinf(f)) y = (fabs(double(f)) > fabs(x) ? y - 1 : y) | 1;  // to odd, to be rounded once
    return u16((y + 0x7fff + (y >> 16 & 1)) >> 16);
}

static u32 permuted(u64 a, u64 b, u64 selector) {
    u64 all = u64(u32(b)) << 32 | u32(a);
    u32 result = 0;
    for (int i = 0; i < 4; i++) {
        u32 which = selector >> 4 * i & 15, byte = all >> 8 * (which & 7) & 255;
        result |= (which & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
    }
    return result;
}

static u64 field(u64 a, u64 at, u64 count, u32 width, bool extend) {
    at &= 255, count &= 255;
    u64 sign = extend && count ? a >> min<u64>(at + count - 1, width - 1) & 1 : 0, result = 0;
    for (u32 i = 0; i < width; i++) result |= (i < count && at + i < width ? a >> (at + i) & 1 : sign) << i;
    return result;
}

// Instructions

enum Opcode {
#define OPERATION(name, mnemonics, result) name,
#include "operations.inc"
#undef OPERATION
    BARRIER, WARP_BARRIER, BRANCH, TABLE, RETURN, THREAD, PROGRAM, PROGRAMS, PACK, UNPACK, SHUFFLE_TO, SHUFFLE_XOR,
    LOAD_GLOBAL, LOAD_SHARED, STORE_GLOBAL, STORE_SHARED, COPY, COPY_COMMIT, COPY_WAIT, LOAD_MATRIX, STORE_MATRIX,
    MULTIPLY, GROUP_MULTIPLY, GROUP_COMMIT, GROUP_WAIT, OPCODES
};

static const char* MNEMONICS[] = {
#define OPERATION(name, mnemonics, result) mnemonics,
#include "operations.inc"
#undef OPERATION
    "BARRIER", "WARP_BARRIER", "BRANCH", "TABLE", "RETURN", "THREAD", "PROGRAM", "PROGRAMS", "PACK", "UNPACK",
    "SHUFFLE_TO", "SHUFFLE_XOR", "LOAD_GLOBAL", "LOAD_SHARED", "STORE_GLOBAL", "STORE_SHARED", "COPY", "COPY_COMMIT",
    "COPY_WAIT", "LOAD_MATRIX", "STORE_MATRIX", "MULTIPLY", "GROUP_MULTIPLY", "GROUP_COMMIT", "GROUP_WAIT"};

struct Error : runtime_error { using runtime_error::runtime_error; };

struct Copy { u64 to, from; int size, present; };

struct Warp {
    int id;
    bool done = false;
    i64 at = 0;
    vector<u64> registers;
    vector<Copy> copies;
    vector<const i64*> products;
    vector<vector<Copy>> copy_groups;
    vector<vector<const i64*>> product_groups;
    u64* operator[](i64 i) { return &registers[i * LANES]; }
};

struct Touched { u32 writer = 0, reader = 0; };  // programs from 1 on

struct Tensor {
    u64 base, size;
    vector<Touched> touched;  // of two bytes each
};

static u64 rows_of_banks;  // 128 bytes each, that have passed to or from shared memory: a cycle of a processor each

static void count_rows(const u64* address, u32 active, int size) {
    // 32 banks of 4 bytes; of wide accesses a half or a quarter of a warp at a time; one place is read once for all
    int together = size <= 4 ? LANES : size == 8 ? LANES / 2 : LANES / 4;
    for (int first = 0; first < LANES; first += together) {
        vector<u32> words[LANES];
        for (int l = first; l < first + together; l++)
            for (int i = 0; (active >> l & 1) && i < max(1, size / 4); i++) {
                u32 word = u32(address[l]) / 4 + i;
                auto& bank = words[word % LANES];
                if (find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
            }
        size_t most = 0;
        for (auto& bank : words) most = max(most, bank.size());
        rows_of_banks += most;
    }
}

struct Machine {
    const i64* const* code;
    i64 length;
    vector<Tensor> tensors;
    vector<uint8_t> shared, written;
    u32 grid[3], program[3], current = 0;
    int lanes = 0;  // exchanged: the order in which the lanes of a warp store

    [[noreturn]] void fail(const char* what, u64 address) {
        char message[200];
        snprintf(message, sizeof message, "%s at 0x%llx in program %u", what, (unsigned long long)address, current - 1);
        throw Error(message);
    }

    uint8_t* global(u64 address, int size, bool write) {
        if (address % size) fail("misaligned global access", address);
        for (auto& t : tensors) {
            if (address < t.base || address + size > t.base + t.size) continue;
            for (int i = 0; i < size; i += 2) {
                Touched& x = t.touched[(address - t.base + i) / 2];
                if (x.writer && x.writer != current) fail("another program writes what is touched", address);
                if (write && x.reader && x.reader != current) fail("another program reads what is written", address);
                (write ? x.writer : x.reader) = !write && x.reader && x.reader != current ? ALL : current;
            }
            return (uint8_t*)address;
        }
        fail(write ? "write outside of all tensors" : "read outside of all tensors", address);
    }

    uint8_t* local(u64 address, int size, bool write) {
        address = u32(address);
        if (address % size) fail("misaligned access to shared memory", address);
        if (address + size > shared.size()) fail("access outside of shared memory", address);
        for (int i = 0; i < size; i++) {
            if (write) written[address + i] = 1;
            else if (!written[address + i]) fail("read of shared memory that nothing was written to", address);
        }
        return &shared[address];
    }

    uint8_t* memory(bool global_, u64 address, int size, bool write) {
        return global_ ? global(address, size, write) : local(address, size, write);
    }

    bool run(Warp& w);
    void multiply(Warp& w, const i64* p);
    void multiply_group(Warp& w, const i64* p);
    u32 described(u64 descriptor, int row, int k, int size, bool rows_first);
};

// Tensor cores

struct Fragment {  // a 16 x K operand or its transpose, as a warp holds it: pairs of 16 bits, or one TF32 number
    float x[16][16];
    Fragment(Warp& w, const i64* registers, int count, int size) {
        for (int lane = 0; lane < LANES; lane++)
            for (int i = 0; i < count; i++) {
                // the first operand has its rows 8 and more in every second register, the second one has none
                int row = lane / 4 + (count == 4 ? i % 2 * 8 : 0), block = count == 4 ? i / 2 : i;
                u64 v = w[registers[i]][lane];
                if (size == 2) {
                    x[row][block * 8 + lane % 4 * 2] = brain(v);
                    x[row][block * 8 + lane % 4 * 2 + 1] = brain(v >> 16);
                } else {
                    x[row][block * 4 + lane % 4] = tf32(v);
                }
            }
    }
};

void Machine::multiply(Warp& w, const i64* p) {  // K, size, D (4), A (4), B (2), C (4)
    int K = p[0], size = p[1];
    Fragment a(w, p + 6, 4, size), b(w, p + 10, 2, size);
    for (int lane = 0; lane < LANES; lane++)
        for (int i = 0; i < 4; i++) {
            int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            double sum = number(w[p[12 + i]][lane]);
            for (int k = 0; k < K; k++) sum += double(a.x[row][k]) * b.x[column][k];
            w[p[2 + i]][lane] = bits(float(sum));
        }
}

u32 Machine::described(u64 descriptor, int row, int k, int size, bool rows_first) {
    // Where an element is that a matrix descriptor describes: PTX ISA, "Asynchronous warpgroup level matrix shared
    // memory layout". Units of 16 bytes; of the swizzled layouts the address's own bits say how.
    u32 start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
    u32 stride = (descriptor >> 32 & 0x3fff) << 4, mode = descriptor >> 62, address;
    u32 width = mode == 0 ? 16 : 256 >> mode, wide = width / size;
    if (!rows_first) {
        address = start + row / 8 * stride + row % 8 * width + k * size;
        if (mode == 0) address += k * size / 16 * (leading - 16);
    } else {
        u32 of_rows = mode == 0 ? stride : leading, of_k = mode == 0 ? leading : stride;
        address = start + row / wide * of_rows + row % wide * size + k % 8 * width + k / 8 * of_k;
    }
    return mode == 0 ? address : address ^ (address >> 7 & (width / 16 - 1)) << 4;
}

void Machine::multiply_group(Warp& w, const i64* p) {
    // N, K, size, whether A is in registers, A and B transposed, D (N / 2), A (4, or its descriptor), B, whether to add
    int N = p[0], K = p[1], size = p[2], in_registers = p[3];
    const i64 *d = p + 6, *a = d + N / 2, *b = a + (in_registers ? 4 : 1);
    auto loaded = [&](i64 descriptor, int row, int k, bool rows_first) {
        u32 value = 0;
        memcpy(&value, local(described(w[descriptor][0], row, k, size, rows_first), size, false), size);
        return size == 2 ? brain(value) : tf32(value);
    };
    vector<vector<float>> first(16, vector<float>(K)), second(N, vector<float>(K));
    if (in_registers) {
        Fragment fragment(w, a, 4, size);
        for (int i = 0; i < 16; i++) first[i].assign(fragment.x[i], fragment.x[i] + K);
    } else {
        for (int i = 0; i < 16; i++)
            for (int k = 0; k < K; k++) first[i][k] = loaded(*a, w.id % 4 * 16 + i, k, p[4]);
    }
    for (int j = 0; j < N; j++)
        for (int k = 0; k < K; k++) second[j][k] = loaded(*b, j, k, p[5]);
    if (w.id % 4 == 0) rows_of_banks += u64(in_registers ? N : N + 64) * K * size / 128;  // once for four warps
    bool add = w[b[1]][0] & 1;
    for (int lane = 0; lane < LANES; lane++)
        for (int i = 0; i < N / 2; i++) {
            int row = lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
            double sum = add ? number(w[d[i]][lane]) : 0;
            for (int k = 0; k < K; k++) sum += double(first[row][k]) * second[column][k];
            w[d[i]][lane] = bits(float(sum));
        }
}

// Warps

bool Machine::run(Warp& w) {  // to a barrier (true) or the end
    for (;;) {
        if (w.at >= length) throw Error("ran beyond the last instruction");
        const i64 *instruction = code[w.at++], *p = instruction + 3;
        u32 active = ALL;
        if (instruction[1] >= 0) {
            active = 0;
            for (int l = 0; l < LANES; l++) active |= u32((w[instruction[1]][l] & 1) != u64(instruction[2])) << l;
        }
#define EACH for (int l = 0; l < LANES; l++) if (active >> l & 1)
        switch (instruction[0]) {
#define PAIR(result) ([&] { u32 low = result; a >>= 16, b >>= 16, c >>= 16; return low | (result) << 16; }())
#define OPERATION(name, mnemonics, result) \
    case name: { \
        u64 *to = w[p[0]], *x = w[p[1]], *y = w[p[2]], *z = w[p[3]]; \
        EACH { u64 a = x[l], b = y[l], c = z[l]; (void)a, (void)b, (void)c; to[l] = u64(result); } \
        break; \
    }
#include "operations.inc"
#undef OPERATION
            case BARRIER:
                if (active != ALL) throw Error("a barrier that a part of a warp takes");
                return true;
            case WARP_BARRIER: break;
            case BRANCH:
                if (active == ALL) w.at = p[0];
                else if (active) throw Error("a branch that a part of a warp takes");
                break;
            case TABLE: {
                u32 which = u32(w[p[0]][0]);
                EACH if (u32(w[p[0]][l]) != which) throw Error("a branch that a part of a warp takes");
                if (which >= u64(p[1])) throw Error("a branch beyond its table");
                w.at = p[2 + which];
                break;
            }
            case RETURN:
                if (active && active != ALL) throw Error("a return of a part of a warp");
                if (active) { w.done = true; return false; }
                break;
            case THREAD: EACH w[p[0]][l] = w.id * LANES + l; break;
            case PROGRAM: EACH w[p[0]][l] = program[p[1]]; break;
            case PROGRAMS: EACH w[p[0]][l] = grid[p[1]]; break;
            case PACK: EACH {
                u64 mask = (u64(1) << p[0]) - 1;
                w[p[1]][l] = (w[p[2]][l] & mask) | (w[p[3]][l] & mask) << p[0];
            } break;
            case UNPACK: EACH {
                u64 mask = (u64(1) << p[0]) - 1, value = w[p[3]][l];
                w[p[1]][l] = value & mask, w[p[2]][l] = value >> p[0] & mask;
            } break;
            case SHUFFLE_TO: case SHUFFLE_XOR: {
                if (active != ALL) throw Error("a shuffle among a part of a warp");
                vector<u64> from(w[p[1]], w[p[1]] + LANES), lane(w[p[2]], w[p[2]] + LANES);
                u32 clamp = w[p[3]][0] & 31, segment = w[p[3]][0] >> 8 & 31;
                EACH {
                    u32 j = lane[l] & 31;
                    j = instruction[0] == SHUFFLE_XOR ? l ^ j : (l & segment) | (j & ~segment);
                    w[p[0]][l] = u32(from[j > ((clamp & ~segment) | (l & segment)) ? l : j]);
                }
                break;
            }
            case LOAD_GLOBAL: case LOAD_SHARED: {  // bytes, how many, offset, address, to
                vector<u64> address(w[p[3]], w[p[3]] + LANES);
                for (auto& x : address) x += p[2];
                if (instruction[0] == LOAD_SHARED) count_rows(&address[0], active, p[0] * p[1]);
                EACH {
                    uint8_t* m = memory(instruction[0] == LOAD_GLOBAL, address[l], p[0] * p[1], false);
                    for (int i = 0; i < p[1]; i++) {
                        u64 value = 0;
                        memcpy(&value, m + i * p[0], p[0]);
                        w[p[4 + i]][l] = value;
                    }
                }
                break;
            }
            case STORE_GLOBAL: case STORE_SHARED: {
                vector<u64> address(w[p[3]], w[p[3]] + LANES);
                for (auto& x : address) x += p[2];
                if (instruction[0] == STORE_SHARED) count_rows(&address[0], active, p[0] * p[1]);
                for (int i = 0; i < LANES; i++) {
                    int l = i ^ lanes;
                    if (!(active >> l & 1)) continue;
                    uint8_t* m = memory(instruction[0] == STORE_GLOBAL, address[l], p[0] * p[1], true);
                    for (int k = 0; k < p[1]; k++) memcpy(m + k * p[0], &w[p[4 + k]][l], p[0]);
                }
                break;
            }
            case COPY:  // offset and address in shared memory, in global memory, bytes, those that are there
                EACH w.copies.push_back(
                    {w[p[1]][l] + p[0], w[p[3]][l] + p[2], int(p[4]), int(u32(w[p[5]][l]))});
                break;
            case COPY_COMMIT: w.copy_groups.push_back(w.copies), w.copies.clear(); break;
            case COPY_WAIT:
                for (; i64(w.copy_groups.size()) > p[0]; w.copy_groups.erase(w.copy_groups.begin()))
                    for (auto& copy : w.copy_groups[0]) {
                        uint8_t* to = local(copy.to, copy.size, true);
                        memset(to, 0, copy.size);
                        if (copy.present) memcpy(to, global(copy.from, copy.present, false), copy.present);
                    }
                break;
            case LOAD_MATRIX: case STORE_MATRIX: {  // how many, transposed, offset, address, registers
                for (int i = 0; i < p[0]; i++) {
                    vector<u64> address(LANES);
                    for (int r = 0; r < 8; r++) address[r] = w[p[3]][8 * i + r] + p[2];
                    count_rows(&address[0], 0xff, 16);
                    u16 matrix[8][8];
                    bool load = instruction[0] == LOAD_MATRIX;
                    for (int pass = 0; pass < 2; pass++) {
                        if (load == (pass == 0))
                            for (int r = 0; r < 8; r++) {
                                uint8_t* row = local(address[r], 16, !load);
                                load ? memcpy(matrix[r], row, 16) : memcpy(row, matrix[r], 16);
                            }
                        else
                            for (int l = 0; l < LANES; l++) {
                                int r = l / 4, c = l % 4 * 2;
                                u16 &low = p[1] ? matrix[c][r] : matrix[r][c];
                                u16 &high = p[1] ? matrix[c + 1][r] : matrix[r][c + 1];
                                u64& value = w[p[4 + i]][l];
                                if (load) value = low | u32(high) << 16;
                                else low = u16(value), high = u16(value >> 16);
                            }
                    }
                }
                break;
            }
            case MULTIPLY: multiply(w, p); break;
            case GROUP_MULTIPLY: w.products.push_back(p); break;
            case GROUP_COMMIT: w.product_groups.push_back(w.products), w.products.clear(); break;
            case GROUP_WAIT:
                for (; i64(w.product_groups.size()) > p[0]; w.product_groups.erase(w.product_groups.begin()))
                    for (auto product : w.product_groups[0]) multiply_group(w, product);
                break;
            default: throw Error("an unknown instruction");
        }
    }
}

extern "C" const char* mnemonics(int i) { return i < OPCODES ? MNEMONICS[i] : nullptr; }

// Runs a grid of programs. `initial`: pairs of a register and its value, of constants and parameters; `tensors`: pairs
// of an address and bytes. Returns 0, or 1 and a message, at the instruction `stopped_at`. `passed`: rows of banks.
extern "C" int run(
    const i64* const* code, i64 length, i64 registers, const i64* initial, i64 initials, const u64* tensors, i64 count,
    i64 shared, int warps, const u32* grid, u32 seed, char* message, i64* stopped_at, u64* passed) {
    rows_of_banks = 0;
    mt19937 random(seed);
    Machine m;
    m.code = code, m.length = length, m.lanes = seed ? random() % LANES : 0;
    copy(grid, grid + 3, m.grid);
    for (i64 i = 0; i < count; i++) {
        m.tensors.push_back({tensors[2 * i], tensors[2 * i + 1], vector<Touched>(tensors[2 * i + 1] / 2 + 1)});
    }
    vector<u64> start(registers * LANES, 0xdeadbeefdeadbeefull);
    for (i64 i = 0; i < initials; i++)
        fill_n(&start[initial[2 * i] * LANES], LANES, u64(initial[2 * i + 1]));
    vector<u32> programs(grid[0] * grid[1] * grid[2]);
    for (u32 i = 0; i < programs.size(); i++) programs[i] = i;
    if (seed) shuffle(programs.begin(), programs.end(), random);
    vector<Warp> all;
    int now = 0;
    try {
        for (u32 program : programs) {
            m.current = program + 1;
            m.program[0] = program % grid[0], m.program[1] = program / grid[0] % grid[1];
            m.program[2] = program / grid[0] / grid[1];
            m.shared.assign(shared, 0xff), m.written.assign(shared, 0);
            all.assign(warps, Warp());
            vector<int> order(warps);
            for (int i = 0; i < warps; i++) all[i].id = order[i] = i, all[i].registers = start;
            for (int waiting = warps; waiting;) {
                if (seed) shuffle(order.begin(), order.end(), random);
                waiting = 0;
                for (int i : order) {
                    now = i;
                    if (!all[i].done) waiting += m.run(all[i]);
                }
                int done = count_if(all.begin(), all.end(), [](Warp& w) { return w.done; });
                if (waiting && done) throw Error("a barrier that some warps never come to");
            }
        }
    } catch (exception& error) {
        snprintf(message, 400, "%s", error.what());
        *stopped_at = all[now].at - 1;
        return 1;
    }
    *passed = rows_of_banks;
    return 0;
}
