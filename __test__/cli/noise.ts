/** Deterministic noise: bytes that do not compress and are never zero for long. */
export function noise(bytes: number): Buffer {
  const buffer = Buffer.alloc(bytes)
  let state = 0x9e3779b9
  for (let at = 0; at < bytes; at += 4) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    buffer.writeUInt32LE((state ^ (state >>> 15)) >>> 0, at)
  }
  return buffer
}
