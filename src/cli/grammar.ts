/** Options that several commands share, and how commander is told about qemu-img's habits. */

import { type Command, Option } from 'commander'
import { type Ability, can, listed, SOURCE_FORMATS, TARGET_FORMATS } from '../formats/table.js'
import type { CacheMode } from '../index.js'
import { CommandFailure, UsageFailure, unsupported } from './failure.js'
import { joinOptionLists } from './options.js'
import { sizeArgument, toSize } from './size.js'

/** The formats that images are read in, and those that they are made in, for help. */
export const SOURCES = listed(SOURCE_FORMATS, 'or')
export const TARGETS = listed(TARGET_FORMATS, 'or')

/** Those that have an ability. */
export const formatsThat = (ability: Ability): string =>
  listed(
    SOURCE_FORMATS.filter(format => can(format, ability)),
    'or',
  )

/** `-o` lists join up; a list that cannot be joined is refused at once. */
export const optionList = (list: string, previous: string | undefined): string => joinOptionLists(previous, list)

export const outputOption = (...formats: readonly string[]): Option =>
  new Option('--output <format>', `format of the output: ${formats.join(', ')}`).argParser(value => {
    if (formats.includes(value)) return value
    const last = formats.at(-1)
    const list = `${formats
      .slice(0, -1)
      .map(format => `'${format}'`)
      .join(', ')} or '${last}'`
    throw new UsageFailure(`--output expects ${list}, not '${value}'`)
  })

/** Options that qemu-img has and this version does not: known, so that the message can say why they are refused. */
export function refuse(command: Command, flags: string, why: string): void {
  const option = new Option(flags).hideHelp()
  command.addOption(option)
  command.on(`option:${option.name()}`, () => {
    throw unsupported(`Option '${option.short ?? option.long}'`, why)
  })
}

/** `--object secret,…` and `--object tls-creds-…`, as often as there are such. */
export function takeObjects(command: Command): void {
  command.addOption(
    new Option(
      '--object <definition>',
      'a secret: secret,id=ID,file=NAME (or data=TEXT); or what TLS begins with: tls-creds-x509 (or tls-creds-psk),id=ID,dir=FOLDER',
    ),
  )
}

/** `--object` and `--image-opts`: how encrypted images are opened. */
export function takeDriverSyntax(command: Command): void {
  takeObjects(command)
  command.option(
    '--image-opts',
    'images are described by options: driver=qcow2,encrypt.key-secret=ID,file.filename=NAME',
  )
}

/** `--member`: which disk of an appliance. The first is of the first image, the second of the second. */
export function takeMember(command: Command): void {
  const help =
    'the disk of an appliance (.ova, .ovf) that has several, by its file or id; of several images, once for each'
  const gather = (name: string, previous: readonly string[] = []): string[] => [...previous, name]
  later(command, new Option('--member <name>', help).argParser(gather))
}

/** `--parent`: what lies below the image, or the first one, where what it names is not there. */
export function takeParent(command: Command): void {
  const help =
    'the image below, in place of the one that the first image names or knows by a UUID; again for the one below that'
  const gather = (name: string, previous: readonly string[] = []): string[] => [...previous, name]
  later(command, new Option('--parent <file>', help).argParser(gather))
}

const laterOptions = new WeakSet<Option>()

/** Whether newer versions of qemu-img have this option only: it must not make an older one's abbreviation ambiguous. */
export const isLater = (option: Option): boolean => laterOptions.has(option)

/** An option that newer versions of qemu-img have beside those of the older ones. */
export function later(command: Command, option: Option): void {
  laterOptions.add(option)
  command.addOption(option)
}

/** Other spellings of an option of this command, as newer versions of qemu-img have them. */
export function alias(command: Command, of: string, ...spellings: readonly string[]): void {
  const meant = command.options.find(option => option.long === of)
  if (meant === undefined) throw new Error(`no option ${of}`)
  for (const spelling of spellings) {
    const option = new Option(meant.required ? `${spelling} <value>` : spelling).hideHelp()
    // Parsed as the option that it means; its own name has no value.
    if (meant.parseArg !== undefined) option.argParser(meant.parseArg)
    later(command, option)
    command.on(`option:${option.name()}`, () => {
      command.setOptionValue(meant.attributeName(), command.getOptionValue(option.attributeName()))
    })
  }
}

const CACHE_MODES = ['none', 'writeback', 'unsafe', 'directsync', 'writethrough', 'off']

/** A cache mode by QEMU's names. */
export const cacheMode =
  (what: string, exitCode = 1) =>
  (value: string): string => {
    if (CACHE_MODES.includes(value)) return value
    throw new CommandFailure(`Invalid ${what} option: ${value}`, { exitCode })
  }

/** A number of bytes a second. */
export const rateLimit = (text: string): number | bigint => toSize(sizeArgument('rate limit', text))

/** The library's name of a cache mode. */
export const toCacheMode = (mode: string): CacheMode => (mode === 'off' ? 'none' : (mode as CacheMode))

/** A whole number in a range. */
export const wholeNumber =
  (what: string, least: number, most: number) =>
  (value: string): number => {
    const number = /^\d+$/.test(value) ? Number(value) : Number.NaN
    if (number >= least && number <= most) return number
    throw new CommandFailure(`Invalid ${what} specified: '${value}'. Must be between ${least} and ${most}.`)
  }

/** The one file that a command works on. */
export function oneFile(files: readonly string[]): string {
  const [filename] = files
  if (filename === undefined || files.length !== 1) throw new UsageFailure('Expecting one image file name')
  return filename
}
