// Uses the installed package for real, by require and by import; prints what it found as one line of JSON.
const assert = require('node:assert/strict')
const { randomBytes } = require('node:crypto')
const { mkdtempSync, readFileSync, rmSync, writeFileSync } = require('node:fs')
const { tmpdir } = require('node:os')
const { join } = require('node:path')
const qcow2 = require('qcow2')

async function main() {
  const module = await import('qcow2')
  for (const name of Object.keys(qcow2)) assert.equal(module[name], qcow2[name], `${name} is another object by import`)

  const folder = mkdtempSync(join(tmpdir(), 'qcow2-smoke-'))
  try {
    const [raw, image, back] = ['disk.raw', 'disk.qcow2', 'back.raw'].map(name => join(folder, name))
    const bytes = Buffer.concat([randomBytes(200_000), Buffer.alloc(800_000), Buffer.from('text '.repeat(40_000))])
    writeFileSync(raw, bytes)
    await qcow2.convert(raw, image, { from: 'raw', to: 'qcow2', compress: true })
    await module.convert(image, back, { to: 'raw' })
    // A raw disk has whole sectors: what was short of one is padded.
    const returned = readFileSync(back)
    assert.ok(returned.length - bytes.length < 512 && bytes.equals(returned.subarray(0, bytes.length)))
    const opened = await module.open(image)
    assert.ok(opened instanceof qcow2.Image)
    const { bytesRead, buffer } = await opened.read(Buffer.alloc(1000), { position: 100_000 })
    assert.ok(buffer.subarray(0, bytesRead).equals(bytes.subarray(100_000, 100_000 + bytesRead)) && bytesRead === 1000)
    await opened.close()
    await assert.rejects(module.open(raw), error => error instanceof qcow2.Qcow2Error && typeof error.code === 'string')
  } finally {
    rmSync(folder, { recursive: true })
  }
  console.log(JSON.stringify({ node: process.versions.node, version: qcow2.version, names: Object.keys(qcow2).length }))
}

main().catch(error => {
  console.error(error)
  process.exitCode = 1
})
