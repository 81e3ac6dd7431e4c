/** Every file that calls the system, what it calls, and the rows of CONTRIBUTING.md that say what becomes of each error. */

import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { expect, it } from 'vitest'

const root = fileURLToPath(new URL('../..', import.meta.url))

/** Calls of a file, and the beginnings of the rows. */
type Known = Readonly<Record<string, readonly [calls: string, ...rows: string[]]>>

const OPENING = 'open, stat, fstat of an image'
const NAMING = 'link, rename'
const KEPT = 'fchown, fchmod, attributes'
const HINTS = 'fadvise, sync_file_range'
const SPACE = 'fallocate, punch, zero'
const SOCKETS = 'flags, addresses and options of sockets'
const ASKED = 'stat, realpath that JavaScript asks'
const READ_BY_COMMANDS = 'a file that a command reads'
const JOB_TARGET = ['renewing a job', "link of a job's target", "stat of a job's target"] as const

const RUST: Known = {
  'core/src/storage/file.rs': ['fcntl_getfl read_link', OPENING, 'flags of a descriptor', 'close'],
  'core/src/storage/new_file.rs': [
    'metadata read_link remove_file rename symlink_metadata',
    ...[OPENING, 'readlink, lstat', NAMING, 'unlink of an unfinished file'],
  ],
  'core/src/storage/platform/alignment.rs': ['ioctl statx write', 'statx, BLKSSZGET'],
  'core/src/storage/platform/attributes.rs': [
    'fcopyfile fgetxattr fgetxattr_query flistxattr flistxattr_query fremovexattr fsetxattr fstatvfs geteuid ioctl ioctl_getflags ioctl_setflags metadata statx',
    ...[KEPT, 'statvfs'],
  ],
  'core/src/storage/platform/byte_lock.rs': ['fcntl', 'fcntl locks'],
  'core/src/storage/platform/copy.rs': ['ioctl', 'FICLONERANGE'],
  'core/src/storage/platform/device.rs': ['ioctl', 'BLKGETSIZE64, BLKROGET'],
  'core/src/storage/platform/file.rs': [
    'close fcntl fcntl_getfl fcntl_setfl',
    'close',
    'open of a descriptor anew',
    'flags of a',
  ],
  'core/src/storage/platform/hints.rs': ['fadvise sync_file_range', HINTS],
  'core/src/storage/platform/limits.rs': ['major minor read_to_string', 'BLKGETSIZE64, BLKROGET, sysfs'],
  'core/src/storage/platform/space/apple.rs': ['fcntl fstatfs seek', 'F_PUNCHHOLE', 'lseek for holes', HINTS],
  'core/src/storage/platform/space/linux.rs': ['fallocate fstatfs ioctl seek', SPACE, 'lseek for holes', HINTS],
  'core/src/storage/platform/sync.rs': ['fsync', 'fsync of the file'],
  'core/src/storage/platform/transfer.rs': ['pread pwrite pwritev', 'pread', 'pwrite, fdatasync'],
  'core/src/storage/platform/unnamed.rs': [
    'fstatfs linkat open remove_file rename renameat_with symlink_metadata syncfs',
    ...['open of an unnamed file', NAMING, 'fsync of the file', 'readlink, lstat', 'unlink of an unfinished file'],
  ],
  'engine/src/files/overlay.rs': ['remove_file', 'unlink of an unfinished file'],
  'nbd/src/client/connect.rs': [
    'connect fcntl_setfd ioctl_fionbio set_socket_keepalive socket',
    'socket, connect',
    SOCKETS,
  ],
  'nbd/src/server/listener.rs': [
    'poll remove_file set_socket_keepalive symlink_metadata',
    ...['bind, getaddrinfo', 'accept, a descriptor', 'socketpair, a thread', SOCKETS],
  ],
}

const TYPESCRIPT: Known = {
  'src/addon.ts': ['exists', ASKED],
  'src/cli/arguments.ts': ['readFile', 'bytes that are no text'],
  'src/cli/commands/nbd.ts': ['mkdtemp rm unlink write writeFile', 'the pid file'],
  'src/cli/commands/shims.ts': ['chmod lstat mkdir realpath rm stat symlink writeFile', 'files that `qcow2 shims`'],
  'src/cli/create-options.ts': ['statfs', HINTS],
  'src/cli/direct-writer.ts': ['fstat open write', 'write to standard output'],
  'src/cli/io/data.ts': ['readFile', READ_BY_COMMANDS],
  'src/cli/io/disk.ts': ['rm', 'the pid file, the temporary overlay'],
  'src/cli/secrets.ts': ['readFile', 'a secret: wrong, missing, its file'],
  'src/cli/start.ts': [
    'close fstat fsync mkdir open readFile readdir rename stat unlink write writeFile',
    'the folder that compiled code',
  ],
  'src/cli/tls-objects.ts': ['readFile', 'files of `--object tls-creds'],
  'src/jobs/roots.ts': ['lstat', ASKED],
  'src/jobs/target.ts': ['chmod chown link lstat open readdir rename unlink', ...JOB_TARGET],
  'src/jobs/upload.ts': ['open', 'a PUT of a job'],
  'src/support/files.ts': [
    'close fstat open read realpath stat writeFile',
    ...[ASKED, 'open, read, fstat of the first bytes', READ_BY_COMMANDS],
  ],
}

const text = (file: string): string => readFileSync(join(root, file), 'utf8')
const files = (folder: string, ending: string): string[] =>
  readdirSync(join(root, folder), { recursive: true, encoding: 'utf8' })
    .map(name => name.replaceAll('\\', '/'))
    .filter(name => name.endsWith(ending))

/** The names in braces, or behind a module, of everything that matches. */
const names = (source: string, pattern: RegExp): string[] =>
  [...source.matchAll(pattern)].flatMap(([, list = '']) =>
    list.split(',').map(name => name.trim().split(' as ')[0] ?? ''),
  )

const listed = (found: readonly (readonly [file: string, calls: readonly string[]])[]): Record<string, string> =>
  Object.fromEntries(
    found
      .filter(([, calls]) => calls.length > 0)
      .map(([file, calls]) => [file, [...new Set(calls)].toSorted().join(' ')]),
  )

const known = (table: Known): Record<string, string> =>
  Object.fromEntries(Object.entries(table).map(([file, [calls]]) => [file, calls]))

it('the engine calls what is listed', () => {
  const sources = files('crates', '.rs').filter(
    file => /^[a-z0-9]+\/src\//.test(file) && !/^(testkit|fuzz)\/|tests?\.rs$|\/tests\//.test(file),
  )
  const found = sources.map(file => {
    const [source = ''] = text(`crates/${file}`).split('#[cfg(test)]\nmod')
    const called = names(source, /\b(?:rustix::(?:fs|io|net|event|net::sockopt)|libc|fs)::([a-z_0-9]+)\(/g)
    const imported = names(source, /use rustix::\w+::\{([^}]*)\}/g).filter(name => /^[a-z]/.test(name))
    return [file, [...called, ...imported]] as const
  })
  expect(listed(found)).toEqual(known(RUST))
})

it('JavaScript calls what is listed', () => {
  const found = files('src', '.ts').map(file => {
    const imported = names(text(`src/${file}`), /import \{([^}]*)\} from 'node:fs(?:\/promises)?'/g)
    const calls = imported.filter(name => /^[a-z]/.test(name) && !/^type |^constants$|^create\w+Stream$/.test(name))
    return [`src/${file}`, calls.map(name => name.replace(/Sync$/, ''))] as const
  })
  expect(listed(found)).toEqual(known(TYPESCRIPT))
})

it('what becomes of each of their errors has a row, with its test', () => {
  const [, table = ''] = text('CONTRIBUTING.md').split('## What becomes of an error')
  const rows = [...table.matchAll(/^\| (.+?) \| (.+) \| (.+) \|$/gm)].map(([, call = '', , test = '']) => ({
    call,
    test,
  }))
  for (const [file, [, ...starts]] of Object.entries({ ...RUST, ...TYPESCRIPT })) {
    for (const start of starts)
      expect(
        rows.filter(row => row.call.startsWith(start)),
        `${file}: ${start}`,
      ).not.toEqual([])
  }
  const tests = [
    ...files('crates', '.rs').map(file => `crates/${file}`),
    ...files('__test__', '.ts').map(file => `__test__/${file}`),
  ]
  for (const { call, test } of rows.slice(1)) {
    const named = [...test.matchAll(/`([\w/.-]+\.(?:rs|test\.ts))`/g)].map(([, file]) => `/${file}`)
    expect(named.length > 0 || /^none: |`\w+|`__test__/.test(test), `${call}: ${test}`).toBe(true)
    for (const file of named)
      expect(
        tests.some(each => `/${each}`.endsWith(file)),
        `${call}: ${file}`,
      ).toBe(true)
  }
})
