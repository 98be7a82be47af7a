"""PTX as the machine takes it: an array of numbers for each instruction, registers numbered, constants in registers."""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

import numpy as np


class Program(NamedTuple):
    """A kernel."""

    name: str
    code: list[np.ndarray]
    text: list[str]
    registers: int
    constants: dict[int, int]
    """Registers and what is in them from the start."""
    parameters: list[int]
    """The registers of the kernel's parameters."""


class Decoder:
    """Registers, constants and labels of one kernel."""

    def __init__(self, opcodes: dict[str, int]) -> None:
        self.opcodes = opcodes
        self.registers: dict[str, int] = {}
        self.constants: dict[int, int] = {}
        self.zero = self.constant(0)

    def register(self, name: str) -> int:
        return self.registers.setdefault(name, len(self.registers))

    def constant(self, value: int) -> int:
        value = (value + (1 << 63)) % (1 << 64) - (1 << 63)
        register = self.register(f"constant {value}")
        self.constants[register] = value
        return register

    def operand(self, token: str) -> int:
        token = token.strip()
        if token == "global_smem":  # where a kernel's shared memory begins
            return self.zero
        return self.register(token) if re.match(r"[%_A-Za-z]", token) else self.constant(integer(token))

    def several(self, token: str) -> list[int]:
        return [self.operand(t) for t in token.strip("{} ").split(",")]

    def address(self, token: str) -> tuple[int, int]:
        """Offset and register."""
        base, _, offset = token.strip("[] ").partition("+")
        return integer(offset.strip() or "0"), self.operand(base)

    def instruction(self, text: str) -> list[int | str]:
        """Opcode and operands; labels as they are."""
        name, _, rest = text.partition(" ")
        t = [x.strip() for x in re.findall(r"\s*(\{[^}]*\}|\[[^\]]*\]|[^,]+)", rest)]
        if name.startswith("mov.") and "{" in rest:
            bits = int(name[-2:]) // 2
            pack = t[1].startswith("{")
            return [self.opcodes["PACK" if pack else "UNPACK"], bits, *self.several(t[0]), *self.several(t[1])]
        if name.startswith("mov.") and (special := re.fullmatch(r"%(tid|ctaid|nctaid)\.([xyz])", t[1])):
            opcode = {"tid": "THREAD", "ctaid": "PROGRAM", "nctaid": "PROGRAMS"}[special[1]]
            if special[0] in ("%tid.y", "%tid.z"):
                raise NotImplementedError(text)
            return [self.opcodes[opcode], self.operand(t[0]), "xyz".index(special[2])]
        if name.startswith("ld.param"):
            return self.lanewise("mov.b64", [self.operand(t[0]), self.register(f"parameter {t[1].strip('[] ')}")])
        if name in self.opcodes:
            return self.lanewise(name, [self.operand(x) for x in t])
        if memory := re.fullmatch(r"(ld|st)\.(global|shared)(?:\.cg)?(?:\.v([24]))?\.[bsuf](\d+)", name):
            opcode = ("LOAD_" if memory[1] == "ld" else "STORE_") + memory[2].upper()
            address, values = (t[1], t[0]) if memory[1] == "ld" else (t[0], t[1])
            sizes = int(memory[4]) // 8, int(memory[3] or 1)
            return [self.opcodes[opcode], *sizes, *self.address(address), *self.several(values)]
        if matrix := re.fullmatch(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", name):
            address, values = (t[1], t[0]) if matrix[1] == "ld" else (t[0], t[1])
            opcode = self.opcodes["LOAD_MATRIX" if matrix[1] == "ld" else "STORE_MATRIX"]
            return [opcode, int(matrix[2]), int(bool(matrix[3])), *self.address(address), *self.several(values)]
        if re.fullmatch(r"cp\.async\.c[ag]\.shared\.global", name):
            present = self.operand(t[3]) if len(t) > 3 else self.constant(integer(t[2]))
            return [self.opcodes["COPY"], *self.address(t[0]), *self.address(t[1]), integer(t[2]), present]
        if product := re.fullmatch(r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col\.f32\.(bf16|tf32)\.\2\.f32", name):
            size = {"bf16": 2, "tf32": 4}[product[2]]
            return [self.opcodes["MULTIPLY"], int(product[1]), size, *(x for v in t for x in self.several(v))]
        if product := re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(bf16|tf32)\.\3", name):
            return self.group_product(int(product[1]), int(product[2]), {"bf16": 2, "tf32": 4}[product[3]], t)
        return self.control(name, t, text)

    def lanewise(self, name: str, operands: list[int]) -> list[int | str]:
        return [self.opcodes[name], *operands, *[self.zero] * (4 - len(operands))]

    def group_product(self, n: int, k: int, size: int, t: list[str]) -> list[int | str]:
        in_registers = t[1].startswith("{")
        signs, turned = [integer(x) for x in t[4:6]], [integer(x) for x in t[6:]]
        if signs != [1, 1]:
            raise NotImplementedError("a product that is subtracted")
        turned = [0, *turned] if in_registers and turned else turned or [0, 0]
        operands = *self.several(t[0]), *self.several(t[1]), self.operand(t[2]), self.operand(t[3])
        return [self.opcodes["GROUP_MULTIPLY"], n, k, size, int(in_registers), *turned, *operands]

    def control(self, name: str, t: list[str], text: str) -> list[int | str]:
        if name == "bar.sync" and t == ["0"]:
            return [self.opcodes["BARRIER"]]
        if name in ("bra", "bra.uni"):
            return [self.opcodes["BRANCH"], t[0]]
        if name == "brx.idx":
            return [self.opcodes["TABLE"], self.operand(t[0]), t[1]]
        if shuffle := re.fullmatch(r"shfl\.sync\.(idx|bfly)\.b32", name):
            opcode = self.opcodes[{"idx": "SHUFFLE_TO", "bfly": "SHUFFLE_XOR"}[shuffle[1]]]
            return [opcode, *(self.operand(x) for x in t[:4])]
        counted = {"cp.async.wait_group": "COPY_WAIT", "wgmma.wait_group.sync.aligned": "GROUP_WAIT"}
        if name in counted:
            return [self.opcodes[counted[name]], integer(t[0])]
        plain = {
            "ret": "RETURN",
            "bar.warp.sync": "WARP_BARRIER",
            "cp.async.commit_group": "COPY_COMMIT",
            "wgmma.commit_group.sync.aligned": "GROUP_COMMIT",
            # of no meaning where everything that was done is seen at once
            "wgmma.fence.sync.aligned": "WARP_BARRIER",
            "fence.proxy.async.shared::cta": "WARP_BARRIER",
        }
        if name not in plain:
            raise NotImplementedError(f"the machine does not know this instruction: {text}")
        return [self.opcodes[plain[name]]]


def integer(token: str) -> int:
    """A literal; a float32's bits."""
    if token.startswith("0f"):
        return struct.unpack(">I", bytes.fromhex(token[2:]))[0]
    return int(token.rstrip("U"), 0)


def decoded(text: str, name: str, opcodes: dict[str, int]) -> Program:
    """The kernel ``name`` of a PTX file.

    Raises:
        NotImplementedError: an instruction that the machine does not know.
    """
    head, _, body = text[text.index(f".entry {name}(") :].partition("\n{\n")
    lines = (line.partition("//")[0].strip() for line in body[: body.index("\n}\n")].splitlines())
    flat = " ".join(line for line in lines if not line.startswith(".loc")).replace("\t", " ")
    decoder = Decoder(opcodes)
    parameters = [decoder.register(f"parameter {p}") for p in re.findall(rf"\b{name}_param_\d+", head)]
    rows: list[list[int | str]] = []
    texts: list[str] = []
    labels: dict[str, int] = {}
    tables: dict[str, list[str]] = {}
    for statement in flat.split(";"):
        statement, table = statement.strip("{} "), ""
        while label := re.match(r"(\$\w+):\s*", statement):
            table = label[1]
            labels[table] = len(rows)
            statement = statement[label.end() :].lstrip("{} ")
        if statement.startswith(".branchtargets"):
            tables[table] = [t.strip() for t in statement.partition(" ")[2].split(",")]
        if not statement or statement.startswith("."):
            continue
        statement = re.sub(r"\s+", " ", statement) + ("}" if statement.count("{") > statement.count("}") else "")
        guard, at = re.match(r"@(!?)(%\w+) ", statement), -1
        if guard:
            at = decoder.register(guard[2])
        opcode, *operands = decoder.instruction(statement[guard.end() :] if guard else statement)
        rows.append([opcode, at, int(bool(guard and guard[1])), *operands])
        texts.append(statement)
    for row in rows:
        if isinstance(row[-1], str):
            places = [labels[t] for t in tables[row[-1]]] if row[-1] in tables else [labels[row[-1]]]
            row[-1:] = [len(places), *places] if row[-1] in tables else places
    code = [np.array(row, dtype=np.int64) for row in rows]
    return Program(name, code, texts, len(decoder.registers), decoder.constants, parameters)
