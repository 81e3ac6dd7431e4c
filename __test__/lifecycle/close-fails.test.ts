/**
 * File systems that tell of a failed write when the file is closed (NFS, FUSE with a write cache). A preloaded library stands in for one:
 * closing a regular file that is open for writing and longer than 1 MiB fails with ENOSPC.
 */

import { spawnSync } from 'node:child_process'
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { beforeAll, describe, expect, it } from 'vitest'
import { temporaryFolder, writeRaw } from '../api/fixtures.js'
import { runNode } from './child.js'

const folder = temporaryFolder()
const at = (name: string): string => join(folder, name)

const SHIM = `
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>

int close(int fd) {
  static int (*next)(int);
  struct stat file;
  int flags = fcntl(fd, F_GETFL);
  if (!next) next = (int (*)(int))dlsym(RTLD_NEXT, "close");
  int fails = flags >= 0 && (flags & O_ACCMODE) != O_RDONLY && fstat(fd, &file) == 0 && S_ISREG(file.st_mode) &&
              file.st_size > 1 << 20;
  int done = next(fd);
  if (!fails) return done;
  errno = ENOSPC;
  return -1;
}
`

const cc = process.env['CC'] ?? 'cc'
const possible = process.platform === 'linux' && spawnSync(cc, ['--version'], { stdio: 'ignore' }).status === 0
if (!possible) process.stderr.write('SKIPPED (no C compiler, or not Linux): closing that fails\n')

describe.skipIf(!possible)('a write that fails when the file is closed', () => {
  beforeAll(() => {
    writeFileSync(at('shim.c'), SHIM)
    const built = spawnSync(cc, ['-shared', '-fPIC', '-o', at('shim.so'), at('shim.c'), '-ldl'], { encoding: 'utf8' })
    if (built.status !== 0) throw new Error(built.stderr)
    writeRaw(at('disk.raw'), 3 * 2 ** 20, [[0, 3 * 2 ** 20]])
    writeFileSync(at('old.raw'), 'old')
  })

  const outcome = (work: string): string => {
    const program = `
      const at = name => ${JSON.stringify(`${folder}/`)} + name
      const work = async () => { ${work} }
      work().then(() => console.log('done'), error => console.log(error.code, error.syscall))`
    const { code, stdout, stderr } = runNode(program, { env: { LD_PRELOAD: at('shim.so') } })
    expect({ code, stderr }).toEqual({ code: 0, stderr: '' })
    return stdout.trim()
  }

  it.each(['true', 'false'])('is the error of a conversion, whose target does not appear (durable: %s)', durable => {
    const before = readdirSync(folder)
    const convert = (name: string, options: string) =>
      outcome(`await qcow2.convert(at('disk.raw'), at('${name}'), { from: 'raw', durable: ${durable}, ${options} })`)
    expect(convert('new.raw', "to: 'raw'")).toBe('ENOSPC close')
    expect(convert('new.qcow2', "to: 'qcow2'")).toBe('ENOSPC close')
    expect(convert('old.raw', "to: 'raw', overwrite: true")).toBe('ENOSPC close')
    expect(readFileSync(at('old.raw'), 'utf8')).toBe('old')
    expect(readdirSync(folder)).toEqual(before)
  })

  it('is the error of a clone, and of create', () => {
    const clone = `
      const image = await qcow2.open(at('disk.raw'), { format: 'raw' })
      try { await image.clone(at('clone'), { to: 'qcow2' }) } finally { await image.close() }`
    expect(outcome(clone)).toBe('ENOSPC close')
    expect(outcome("await qcow2.create(at('made'), { format: 'raw', size: 2 ** 21 })")).toBe('ENOSPC close')
    expect([existsSync(at('clone')), existsSync(at('made'))]).toEqual([false, false])
  })

  it('is the error of closing an image that was written to, and of no other', () => {
    const close = (flags: string) =>
      `await (await qcow2.open(at('disk.raw'), { format: 'raw', flags: '${flags}' })).close()`
    expect(outcome(close('r+'))).toBe('ENOSPC close')
    expect(outcome(close('r'))).toBe('done')
  })
})
