/** Colours of a terminal, down to none. */

export type Rgb = readonly [red: number, green: number, blue: number]

/** Bits of colour, as `tty.WriteStream.getColorDepth()` gives them. */
export type ColorDepth = 1 | 4 | 8 | 24

const CUBE: readonly number[] = [0, 95, 135, 175, 215, 255]

const nearestCubeStep = (value: number): number =>
  CUBE.reduce((best, level, index) => (Math.abs(level - value) < Math.abs((CUBE[best] ?? 0) - value) ? index : best), 0)

function code(color: Rgb, depth: ColorDepth, background: boolean): string {
  const [red, green, blue] = color
  const base = background ? 48 : 38
  if (depth === 24) return `${base};2;${red};${green};${blue}`
  if (depth === 8) {
    const [r, g, b] = [nearestCubeStep(red), nearestCubeStep(green), nearestCubeStep(blue)]
    return `${base};5;${16 + 36 * r + 6 * g + b}`
  }
  const bright = Math.max(red, green, blue) > 180 ? 60 : 0
  const bit = (value: number, weight: number): number => (value > 110 ? weight : 0)
  return String((background ? 40 : 30) + bright + bit(red, 1) + bit(green, 2) + bit(blue, 4))
}

/** The text in a foreground and, if given, a background colour. */
export function paint(text: string, depth: ColorDepth, foreground: Rgb, background?: Rgb): string {
  if (depth === 1) return text
  const codes = [code(foreground, depth, false), ...(background ? [code(background, depth, true)] : [])]
  return `\u001b[${codes.join(';')}m${text}\u001b[0m`
}

export const bold = (text: string, depth: ColorDepth): string => (depth === 1 ? text : `\u001b[1m${text}\u001b[0m`)
export const dim = (text: string, depth: ColorDepth): string => (depth === 1 ? text : `\u001b[2m${text}\u001b[0m`)

/** Colours mixed by weight. */
export function mix(parts: readonly (readonly [color: Rgb, weight: number])[]): Rgb {
  const total = parts.reduce((sum, [, weight]) => sum + weight, 0) || 1
  const channel = (index: 0 | 1 | 2): number =>
    Math.round(parts.reduce((sum, [color, weight]) => sum + color[index] * weight, 0) / total)
  return [channel(0), channel(1), channel(2)]
}

/** What a stream can show, with NO_COLOR and FORCE_COLOR as everywhere. */
export function colorDepthOf(
  stream: { readonly isTTY?: boolean; getColorDepth?(env?: object): number },
  env: Readonly<Record<string, string | undefined>>,
): ColorDepth {
  if (env['NO_COLOR']) return 1
  const forced = env['FORCE_COLOR']
  if (!stream.isTTY) return forced !== undefined && forced !== '0' && forced !== 'false' ? 24 : 1
  const depth = stream.getColorDepth?.(env) ?? 1
  return depth === 24 || depth === 8 || depth === 4 ? depth : 1
}
