/** File systems without locks: a library in front of libc answers the calls for them as such a file system does. */

import { spawnSync } from 'node:child_process'
import { copyFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { create } from 'qcow2'
import { beforeAll, describe, expect, it } from 'vitest'
import { temporaryFolder } from '../api/fixtures.js'
import { qcow2 } from '../cli/run.js'
import { runNode } from '../lifecycle/child.js'

const folder = temporaryFolder()
const at = (name: string): string => join(folder, name)

const NO_LOCKS = `
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>

static int answer(const char *name, int fd, int command, void *argument) {
  int (*next)(int, int, ...) = (int (*)(int, int, ...))dlsym(RTLD_NEXT, name);
  const char *number = getenv("NO_LOCKS");
  if (number && (command == F_OFD_SETLK || command == F_OFD_GETLK)) {
    errno = atoi(number);
    return -1;
  }
  return next(fd, command, argument);
}

#define IN_FRONT(name) \\
  int name(int fd, int command, ...) { \\
    va_list list; \\
    va_start(list, command); \\
    void *argument = va_arg(list, void *); \\
    va_end(list); \\
    return answer(#name, fd, command, argument); \\
  }
IN_FRONT(fcntl)
IN_FRONT(fcntl64)
`

const cc = process.env['CC'] ?? 'cc'
const possible = process.platform === 'linux' && spawnSync(cc, ['--version'], { stdio: 'ignore' }).status === 0
if (!possible) process.stderr.write('SKIPPED (no C compiler): file systems without locks\n')

/** ENOSYS, ENOLCK and EOPNOTSUPP of Linux. */
const ERRORS = [38, 37, 95]

describe.skipIf(!possible)('a file system without locks', () => {
  const preload = at('no-locks.so')
  beforeAll(async () => {
    writeFileSync(at('no-locks.c'), NO_LOCKS)
    const built = spawnSync(cc, ['-shared', '-fPIC', '-o', preload, at('no-locks.c'), '-ldl'], { encoding: 'utf8' })
    expect(built.stderr).toBe('')
    await (await create(at('a.qcow2'), { size: 2 ** 20 })).close()
  })

  it.each(ERRORS)('is read with forceShare and with locking off, and says what is missing else (%i)', number => {
    const program = `
      const [path] = process.argv.slice(1)
      const tries = [{}, { forceShare: true }, { locking: 'off' }, { locking: 'on', forceShare: true }, { flags: 'r+' }, { flags: 'r+', locking: 'off' }]
      const one = options => qcow2.open(path, options).then(async image => (await image.close(), 'open'), e => e.code + ' ' + e.message)
      ;(async () => { for (const options of tries) console.log(await one(options)) })()`
    const ended = runNode(program, { env: { LD_PRELOAD: preload, NO_LOCKS: String(number) }, args: [at('a.qcow2')] })
    expect(ended).toMatchObject({ code: 0, stderr: '' })
    const missing = expect.stringMatching(/^ERR_QCOW2_UNSUPPORTED_FEATURE .*the file system has no locks .*forceShare/)
    const lines = ended.stdout.trimEnd().split('\n')
    expect(lines).toEqual([missing, 'open', 'open', missing, missing, 'open'])
  })

  it('is what the command line reads with -U', async () => {
    const env = { LD_PRELOAD: preload, NO_LOCKS: '37' }
    expect(await qcow2(['info', '-U', 'a.qcow2'], folder, env)).toMatchObject({ code: 0, stderr: '' })
    const refused = await qcow2(['info', 'a.qcow2'], folder, env)
    expect(refused.code).toBe(1)
    expect(refused.stderr).toContain('the file system has no locks')
    // Raw files are shared with everybody: they need no lock to be read.
    copyFileSync(at('a.qcow2'), at('a.raw'))
    expect(await qcow2(['info', '-f', 'raw', 'a.raw'], folder, env)).toMatchObject({ code: 0, stderr: '' })
  })
})
