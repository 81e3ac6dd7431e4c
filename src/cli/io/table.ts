/** The commands of qemu-io: how each is called, what it needs, and what does it. Help and parser both read this table. */

import { aioFlush, aioRead, aioWrite } from './aio.js'
import type { Context } from './context.js'
import { discard, flush, read, readv, write, writev } from './data.js'
import { close, open, reopen } from './files.js'
import type { Arguments, Flag } from './line.js'
import { alloc, info, length, map, truncate } from './look.js'
import { abort, absent, quit, sigraise, sleep } from './process.js'

export interface IoCommand {
  readonly name: string
  readonly alias?: string
  /** How its words are written. */
  readonly args?: string
  readonly summary: string
  readonly flags?: readonly Flag[]
  /** How many words it takes, flags counted. Default none. */
  readonly least?: number
  readonly most?: number
  /** Runs also where no image is open. */
  readonly withoutFile?: true
  /** Is refused where the image is open for reading only. */
  readonly writes?: true
  run(context: Context, args: Arguments): Promise<boolean>
}

const ANY = Number.POSITIVE_INFINITY

const BARE: Flag = { letter: 'C', help: 'print the numbers alone, for programs' }
const QUIET: Flag = { letter: 'q', help: 'print nothing about a request that succeeds' }
const REGISTER: Flag = { letter: 'r', help: 'accepted for compatibility: buffers need no registration' }
const DUMP: Flag = { letter: 'v', help: 'print the bytes' }
const OLD: Flag = { letter: 'p', help: 'accepted for compatibility' }
const INVALID: Flag = { letter: 'i', help: 'only count the request as an invalid one' }
const DURABLE: Flag = { letter: 'f', help: 'what is written is durable when the request is done' }
const VERIFY: Flag = { letter: 'P', value: true, help: 'byte that all that is read must be' }
const FILL: Flag = { letter: 'P', value: true, help: 'byte to write (default 0xcd)' }
const ZEROES: Flag = { letter: 'z', help: 'write zeroes, without data where possible' }
const UNMAP: Flag = { letter: 'u', help: 'with -z: clusters and their space may be given up' }

const ZONE = (name: string, args: string, summary: string, counts = [2, 2]): IoCommand => ({
  name: `zone_${name}`,
  args,
  summary,
  least: counts[0] ?? 2,
  most: counts[1] ?? 2,
  run: absent(() => `zone ${name} failed`),
})

/** In the order in which they are listed. */
export const COMMANDS: readonly IoCommand[] = [
  { name: 'abort', summary: 'simulate a program crash using abort(3)', withoutFile: true, run: abort },
  { name: 'aio_flush', summary: 'completes all outstanding aio requests', run: aioFlush },
  {
    name: 'aio_read',
    args: '[-Ciqrv] [-P pattern] off len [len..]',
    summary: 'asynchronously reads a number of bytes',
    flags: [BARE, INVALID, VERIFY, QUIET, REGISTER, DUMP],
    least: 2,
    most: ANY,
    run: aioRead,
  },
  {
    name: 'aio_write',
    args: '[-Cfiqruz] [-P pattern] off len [len..]',
    summary: 'asynchronously writes a number of bytes',
    flags: [BARE, DURABLE, INVALID, FILL, QUIET, REGISTER, UNMAP, ZEROES],
    least: 2,
    most: ANY,
    writes: true,
    run: aioWrite,
  },
  {
    name: 'alloc',
    alias: 'a',
    args: 'offset [count]',
    summary: 'checks if offset is allocated in the file',
    least: 1,
    most: 2,
    run: alloc,
  },
  {
    name: 'break',
    args: 'event tag',
    summary: 'sets a breakpoint on event and tags the stopped request as tag',
    least: 2,
    most: 2,
    run: absent(() => 'Could not set breakpoint'),
  },
  { name: 'close', alias: 'c', summary: 'close the current open file', run: close },
  {
    name: 'discard',
    alias: 'd',
    args: '[-Cq] off len',
    summary: 'discards a number of bytes at a specified offset',
    flags: [BARE, QUIET],
    least: 2,
    most: ANY,
    writes: true,
    run: discard,
  },
  { name: 'flush', alias: 'f', summary: 'flush all in-core file state to disk', run: flush },
  {
    name: 'help',
    alias: '?',
    args: '[command]',
    summary: 'help for one or all commands',
    most: 1,
    withoutFile: true,
    run: help,
  },
  { name: 'info', alias: 'i', summary: 'prints information about the current file', run: info },
  { name: 'length', alias: 'l', summary: 'gets the length of the current file', run: length },
  { name: 'map', args: '', summary: 'prints the allocated areas of a file', most: 1, run: map },
  {
    name: 'open',
    alias: 'o',
    args: '[-rsCnkU] [-t cache] [-d discard] [-o options] [path]',
    summary: 'open the file specified by path',
    flags: [
      { letter: 'r', help: 'open it for reading only' },
      { letter: 's', help: 'write to an overlay that is not kept' },
      { letter: 'C', help: 'not supported: reading does not write to the image' },
      { letter: 'n', help: "as -t none: bypass the host's page cache" },
      { letter: 'U', help: 'open it although another process writes to it' },
      { letter: 'k', help: 'accepted for compatibility' },
      { letter: 'i', value: true, help: 'threads, native or io_uring: accepted for compatibility' },
      { letter: 't', value: true, help: 'cache mode' },
      { letter: 'd', value: true, help: 'what a discard does: ignore or unmap' },
      { letter: 'o', value: true, help: 'options of the driver, or what describes the image' },
    ],
    least: 1,
    most: ANY,
    withoutFile: true,
    run: open,
  },
  {
    name: 'quit',
    alias: 'q',
    summary: 'exit the program',
    most: ANY,
    withoutFile: true,
    run: quit,
  },
  {
    name: 'read',
    alias: 'r',
    args: '[-abCqrv] [-P pattern [-s off] [-l len]] off len',
    summary: 'reads a number of bytes at a specified offset',
    flags: [
      { letter: 'b', help: "read a virtual machine's state, not the disk" },
      BARE,
      { letter: 'l', value: true, help: 'with -P: how many bytes must be that' },
      OLD,
      VERIFY,
      QUIET,
      REGISTER,
      { letter: 's', value: true, help: 'with -P: from which of the bytes read' },
      DUMP,
    ],
    least: 2,
    most: ANY,
    run: read,
  },
  {
    name: 'readv',
    args: '[-Cqrv] [-P pattern] off len [len..]',
    summary: 'reads a number of bytes at a specified offset',
    flags: [BARE, VERIFY, QUIET, REGISTER, DUMP],
    least: 2,
    most: ANY,
    run: readv,
  },
  {
    name: 'remove_break',
    args: 'tag',
    summary: 'remove a breakpoint by tag',
    least: 1,
    most: 1,
    run: absent(({ operands: [tag = ''] }) => `Could not remove breakpoint ${tag}`),
  },
  {
    name: 'reopen',
    args: '[(-r|-w)] [-c cache] [-o options]',
    summary: 'reopens an image with new options',
    flags: [
      { letter: 'r', help: 'for reading only' },
      { letter: 'w', help: 'for writing, too' },
      { letter: 'c', value: true, help: 'cache mode' },
      { letter: 'o', value: true, help: 'options of the driver' },
    ],
    most: ANY,
    run: reopen,
  },
  {
    name: 'resume',
    args: 'tag',
    summary: 'resumes the request tagged as tag',
    least: 1,
    most: 1,
    run: absent(() => 'Could not resume request'),
  },
  {
    name: 'sigraise',
    args: 'signal',
    summary: 'raises a signal',
    least: 1,
    most: 1,
    withoutFile: true,
    run: sigraise,
  },
  {
    name: 'sleep',
    summary: 'waits for the given value in milliseconds',
    least: 1,
    most: 1,
    withoutFile: true,
    run: sleep,
  },
  {
    name: 'truncate',
    alias: 't',
    args: '[-m prealloc_mode] off',
    summary: 'truncates the current file at the given offset',
    flags: [{ letter: 'm', value: true, help: 'how much of a new part is allocated: off, metadata, falloc or full' }],
    least: 1,
    most: 3,
    writes: true,
    run: truncate,
  },
  {
    name: 'wait_break',
    args: 'tag',
    summary: 'waits for the suspension of a request',
    least: 1,
    most: 1,
    run: absent(() => 'Could not wait for a request'),
  },
  {
    name: 'write',
    alias: 'w',
    args: '[-bcCfnqruz] [-P pattern | -s source_file] off len',
    summary: 'writes a number of bytes at a specified offset',
    flags: [
      { letter: 'b', help: "write a virtual machine's state, not the disk" },
      { letter: 'c', help: 'write compressed clusters' },
      BARE,
      DURABLE,
      { letter: 'n', help: 'with -z: fail where zeroes would have to be written as data' },
      OLD,
      FILL,
      QUIET,
      REGISTER,
      { letter: 's', value: true, help: 'file whose bytes are written, over and over' },
      UNMAP,
      ZEROES,
    ],
    least: 2,
    most: ANY,
    writes: true,
    run: write,
  },
  {
    name: 'writev',
    args: '[-Cfqr] [-P pattern] off len [len..]',
    summary: 'writes a number of bytes at a specified offset',
    flags: [BARE, DURABLE, FILL, QUIET, REGISTER],
    least: 2,
    most: ANY,
    writes: true,
    run: writev,
  },
  ZONE('append', 'offset len [len..]', 'append write a number of bytes at a specified offset', [3, 4]),
  ZONE('close', 'offset len', 'close a range of zones in zone block device'),
  ZONE('finish', 'offset len', 'finish a range of zones in zone block device'),
  ZONE('open', 'offset len', 'explicit open a range of zones in zone block device'),
  ZONE('report', 'offset number', 'report zone information'),
  ZONE('reset', 'offset len', 'reset a zone write pointer in zone block device'),
]

/** How a command is called, and what it does, in a line. */
export const usageOf = ({ name, args, summary }: IoCommand, calledAs = name): string =>
  `${calledAs}${args === undefined ? '' : ` ${args}`} -- ${summary}`

async function help(context: Context, { operands: [name] }: Arguments): Promise<boolean> {
  if (name === undefined) {
    for (const command of COMMANDS) context.out(`${usageOf(command)}\n`)
    context.out("\nUse 'help commandname' for extended help.\n")
    return true
  }
  const command = COMMANDS.find(each => each.name === name || each.alias === name)
  if (command === undefined) {
    context.out(`command ${name} not found\n`)
    return true
  }
  context.out(`${usageOf(command, name)}\n`)
  const { flags = [] } = command
  if (flags.length > 0) context.out(`\n${flags.map(each => ` -${each.letter}, -- ${each.help}\n`).join('')}\n`)
  return true
}
