// One image from its birth to a checked copy, by the library that lies in dist/ beside the working folder. Prints what was done.
const { mkdtempSync, readFileSync, rmSync, statSync } = require('node:fs')
const { tmpdir } = require('node:os')
const { join, resolve } = require('node:path')
const { check, convert, create } = require(resolve('dist/index.js'))

const MIB = 1 << 20

/** Bytes that a codec has work with and that no offset shares with another. */
const bytes = Buffer.from(Uint8Array.from({ length: 8 * MIB }, (_, at) => (at >> 9) * 31 + (at % 512 < 64 ? at : 0)))

async function tour(folder) {
  const [image, packed, back] = ['image.qcow2', 'packed.qcow2', 'back.raw'].map(name => join(folder, name))
  const disk = await create(image, { size: 64 * MIB })
  await disk.write(bytes, { position: 3 * MIB + 512 })
  await disk.snapshots.create('one')
  await disk.write(Buffer.alloc(MIB, 0x5a), { position: 4 * MIB })
  await disk.close()
  const wanted = Buffer.alloc(64 * MIB)
  bytes.copy(wanted, 3 * MIB + 512)
  wanted.fill(0x5a, 4 * MIB, 5 * MIB)
  for (const compression of ['zlib', 'zstd']) {
    const begun = Date.now()
    await convert(image, packed, {
      to: 'qcow2',
      compress: true,
      create: { compressionType: compression },
      overwrite: true,
    })
    await convert(packed, back, { to: 'raw', overwrite: true })
    if (!readFileSync(back).equals(wanted)) throw new Error(`${compression}: the copy differs`)
    process.stdout.write(`${compression}: ${statSync(packed).size} bytes in ${Date.now() - begun} ms\n`)
  }
  for (const file of [image, packed]) {
    const result = await check(file)
    if (result.corruptions || result.leaks) throw new Error(`${file}: ${JSON.stringify(result)}`)
  }
}

const folder = mkdtempSync(join(tmpdir(), 'qcow2-cross-'))
tour(folder)
  .then(() => process.stdout.write(`loaded and right: ${process.platform} ${process.arch}, Node ${process.version}\n`))
  .catch(error => {
    process.exitCode = 1
    process.stderr.write(`${error.stack}\n`)
  })
  .finally(() => rmSync(folder, { recursive: true, force: true }))
