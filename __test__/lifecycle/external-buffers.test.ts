/**
 * Hosts that refuse external buffers, as Electron does: `napi_create_external_buffer` and `napi_create_external_arraybuffer`
 * return `napi_no_external_buffers_allowed`. An audit library of the dynamic linker does the same to an unmodified addon under plain
 * Node (a preloaded library does not: the executable's own symbols win).
 */

import { spawnSync } from 'node:child_process'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { beforeAll, describe, expect, it } from 'vitest'
import { temporaryFolder, writeRaw } from '../api/fixtures.js'
import { runNode } from './child.js'

const folder = temporaryFolder()
const at = (name: string): string => join(folder, name)

const AUDIT = `
#define _GNU_SOURCE
#include <link.h>
#include <stdint.h>
#include <string.h>

static int refuse(void) { return 22; }

unsigned int la_version(unsigned int version) { (void)version; return LAV_CURRENT; }

unsigned int la_objopen(struct link_map *map, Lmid_t lmid, uintptr_t *cookie) {
  (void)map; (void)lmid; (void)cookie;
  return LA_FLG_BINDTO | LA_FLG_BINDFROM;
}

uintptr_t la_symbind64(Elf64_Sym *sym, unsigned int ndx, uintptr_t *refcook, uintptr_t *defcook,
                       unsigned int *flags, const char *name) {
  (void)ndx; (void)refcook; (void)defcook; (void)flags;
  if (strcmp(name, "napi_create_external_buffer") == 0 || strcmp(name, "napi_create_external_arraybuffer") == 0)
    return (uintptr_t)refuse;
  return sym->st_value;
}
`

/** An addon that asks for an external buffer and exports the status: shows that the audit library works. */
const CONTROL = `
#include <stddef.h>
typedef void *napi_value;
extern int napi_create_external_buffer(void *, size_t, void *, void *, void *, napi_value *);
extern int napi_create_int32(void *, int, napi_value *);
static char memory[16];
napi_value napi_register_module_v1(void *env, napi_value exports) {
  napi_value buffer, status;
  (void)exports;
  napi_create_int32(env, napi_create_external_buffer(env, sizeof memory, memory, NULL, NULL, &buffer), &status);
  return status;
}
`

const cc = process.env['CC'] ?? 'cc'
const possible =
  process.platform === 'linux' &&
  process.arch === 'x64' &&
  spawnSync(cc, ['--version'], { stdio: 'ignore' }).status === 0

function compile(name: string, source: string): string {
  writeFileSync(at(`${name}.c`), source)
  const output = at(`${name}.node`)
  const { status, stderr } = spawnSync(cc, ['-shared', '-fPIC', '-O1', '-o', output, at(`${name}.c`)], {
    encoding: 'utf8',
  })
  if (status !== 0) throw new Error(stderr)
  return output
}

describe.skipIf(!possible)('a host that refuses external buffers', () => {
  let audit = ''
  beforeAll(() => {
    audit = compile('audit', AUDIT)
    writeRaw(at('disk.raw'), 2 ** 20, [[0, 100_000]])
  })

  it('is what the audit library makes of Node', () => {
    const control = compile('control', CONTROL)
    const program = `console.log(require(${JSON.stringify(control)}))`
    expect(runNode(program)).toMatchObject({ code: 0, stdout: '0\n' })
    expect(runNode(program, { env: { LD_AUDIT: audit } })).toMatchObject({ code: 0, stdout: '22\n' })
  })

  it('runs everything', () => {
    const program = `
      const { buffer: collect } = require('node:stream/consumers')
      const [folder] = process.argv.slice(1)
      const raw = folder + '/disk.raw'
      const path = folder + '/disk.qcow2'
      async function all() {
        await qcow2.convert(raw, path, { from: 'raw', to: 'qcow2', compress: true })
        const image = await qcow2.open(path)
        const seen = []
        seen.push((await image.read(Buffer.alloc(4096), { position: 0 })).bytesRead)
        seen.push((await image.readv([new Float64Array(8)], 0)).bytesRead)
        for await (const entry of image.map()) seen.push(entry.length)
        seen.push((await collect(image.createReadStream())).length)
        seen.push((await collect(image.readableWebStream())).length)
        seen.push((await image.info()).virtualSize, (await image.check()).ok)
        await image.close()
        seen.push((await qcow2.compare(raw, path, { formatA: 'raw' })).identical)
        seen.push((await qcow2.inspect(path)).safe, (await qcow2.inspect(Buffer.alloc(512))).safe)
        seen.push(await qcow2.probe(path), (await qcow2.measure(path, { to: 'raw' })).required)
        await (await qcow2.create(folder + '/new.qcow2', { size: 512 })).close()
        seen.push((await qcow2.open(folder + '/missing').catch(error => error)).code)
        return seen
      }
      all().then(seen => console.log(JSON.stringify(seen)))`
    const ended = runNode(program, { env: { LD_AUDIT: audit }, args: [folder] })
    expect(ended).toMatchObject({ code: 0, stderr: '' })
    expect(JSON.parse(ended.stdout)).toEqual([
      ...[4096, 64, 131072, 917504, 1048576, 1048576, 1048576, true],
      ...[true, true, false, 'qcow2', 1048576, 'ENOENT'],
    ])
  })
})
